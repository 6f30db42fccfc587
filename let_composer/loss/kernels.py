"""The alignment loss as Triton kernels behind one ``torch.library`` op; ``reference.py`` is their specification."""

# Triton's decorators hide from pyright what a kernel accepts and returns.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from let_composer.loss.reference import EPSILON

__all__ = ["INTERPRETED", "MAX_WIDTH", "Plan", "alignment_loss", "plan", "target_sum", "try_kernels", "unsupported"]

MAX_WIDTH = 16384

# A program holds a tile [M, V] of R rows: M = R * G groups, V neighbouring columns that one thread moves in one 128-bit
# access. N tokens, D the width in which cosines are taken; the other side is resized to it.
#
#   l = -<s, t> / (|s||t|)        L = sum over mask of l / tokens in mask
#   dL/ds = -g / (n |s|) (t / |t| - cos s / |s|)        saved per token: cos, 1/|s|, 1/|t| (0: no direction)
#
# Resizing. Output column c sits at input coordinate x = ((2c + 1) W - D) / 2D, an exact fraction; it takes input j with
# the hat weight max(0, 1 - |x - j|). Going up, the V columns of a group share a window of few inputs (4 to 6 if V = 8),
# read once per group and spread in registers. Clamping the index replicates the edge, which equals clamping x. Going
# down, V is 1 and the window is the two taps.
#
# What else was compiled for one forward row of 2048 from 768 in bf16 (Triton 3.3, sm_90, sums only), by instructions
# that a warp issues and accesses to memory, shared memory and other lanes among them:
#   this window                               852    66    student loads 128-bit, 40 scalar taps, no spills
#   two taps gathered for each column       1,763   169    student loads 128-bit, 128 scalar taps, no spills
#   teacher row in registers and tl.gather 12,151 4,403    all loads 128-bit, spills; with 4 warps the compiler fails
#   band matrix on tensor cores, 64 rows    1,189   308    all loads 128-bit, spills, and weights rounded to bf16


@triton.jit
def _offset(row, length, stride_outer, stride_inner):
    # Divided in 32 bits, multiplied in 64.
    return (row // length).to(tl.int64) * stride_outer + (row % length).to(tl.int64) * stride_inner


@triton.jit
def _columns(groups, V: tl.constexpr):
    return groups[:, None] * V + tl.arange(0, V)[None, :]  # [M, V]


# The loads below take the start of a row and whether it counts, each a scalar or [M, 1], and the groups [M] to read.


@triton.jit
def _normalized(x, columns, mean, std, inside):
    if mean is not None:
        x -= tl.load(mean + columns, mask=inside, other=0.0).to(tl.float32)
    if std is not None:
        x /= tl.load(std + columns, mask=inside, other=1.0).to(tl.float32)
    return x


@triton.jit
def _load_direct(row, live, groups, mean, std, WIDTH: tl.constexpr, V: tl.constexpr):
    columns = _columns(groups, V)
    inside = live & (columns < WIDTH)
    x = _normalized(tl.load(row + columns, mask=inside, other=0.0).to(tl.float32), columns, mean, std, inside)
    if mean is not None:
        x = tl.where(inside, x, 0.0)
    return x  # [M, V]


@triton.jit
def _coordinate(column, WIDTH: tl.constexpr, TARGET: tl.constexpr):
    """Input coordinate of an output column: floor and fraction."""
    numerator = (2 * column + 1) * WIDTH - TARGET
    floor = (numerator + 2 * TARGET) // (2 * TARGET) - 1  # negative only at the left edge
    return floor, (numerator - floor * (2 * TARGET)).to(tl.float32) / (2 * TARGET)


@triton.jit
def _load_resized(
    row, live, groups, mean, std,
    WIDTH: tl.constexpr, TARGET: tl.constexpr, WINDOW: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    groups = groups[:, None]  # [M, 1] from here: a load of this shape keeps the layout of the [M, V] tile
    inside = live & (groups * V < TARGET)
    if (32 * V * WIDTH) % TARGET == 0:
        # The pattern repeats every 32 groups, so the lanes of a warp keep their weights over all tiles and rows.
        base, x = _coordinate(groups % 32 * V, WIDTH, TARGET)
        base += groups // 32 * (32 * V * WIDTH // TARGET)
    else:
        base, x = _coordinate(groups * V, WIDTH, TARGET)
    x = x + tl.arange(0, V)[None, :] * (WIDTH / TARGET)  # [M, V], relative to base
    out = tl.zeros([M, V], tl.float32)
    for tap in tl.static_range(WINDOW):
        index = tl.minimum(tl.maximum(base + tap, 0), WIDTH - 1)
        value = _normalized(tl.load(row + index, mask=inside, other=0.0).to(tl.float32), index, mean, std, inside)
        out += tl.maximum(1.0 - tl.abs(x - tap), 0.0) * value
    if TARGET % V != 0:
        out = tl.where(groups * V + tl.arange(0, V)[None, :] < TARGET, out, 0.0)
    return out  # [M, V]


@triton.jit
def _load(
    row, live, groups, mean, std,
    WIDTH: tl.constexpr, TARGET: tl.constexpr, WINDOW: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    if WIDTH == TARGET:
        x = _load_direct(row, live, groups, mean, std, WIDTH, V)
    else:
        x = _load_resized(row, live, groups, mean, std, WIDTH, TARGET, WINDOW, M, V)
    return x


# Squares of a row overflow beyond a norm of 2^64. Such rows are summed again after an exact multiplication with 2^-72,
# which brings every finite row of up to MAX_WIDTH columns into range; only infinities and NaNs remain.
_SHRINK = tl.constexpr(2.0**-72)
_INFINITY = tl.constexpr(float("inf"))
_EPSILON = tl.constexpr(EPSILON)


@triton.jit
def _inverse_norm(squares, scale):
    """Inverse norm of the scaled row, 0 for a row without a direction."""
    norm = tl.sqrt_rn(squares)
    usable = (squares < _INFINITY) & (norm >= _EPSILON * scale)
    return tl.where(usable, tl.div_rn(1.0, tl.where(usable, norm, 1.0)), 0.0)


@triton.jit
def _sums(
    student, teacher, live, mean, std, student_scale, teacher_scale,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, TARGET: tl.constexpr, WINDOW: tl.constexpr,
    TILES: tl.constexpr, G: tl.constexpr, V: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    ss = tl.zeros([G], tl.float32)
    tt = tl.zeros([G], tl.float32)
    st = tl.zeros([G], tl.float32)
    for tile in tl.range(0, TILES, loop_unroll_factor=1 if SCALED else 2):
        groups = tile * G + tl.arange(0, G)
        s = _load(student, live, groups, None, None, STUDENT, TARGET, WINDOW, G, V)
        t = _load(teacher, live, groups, mean, std, TEACHER, TARGET, WINDOW, G, V)
        if SCALED:
            s *= student_scale
            t *= teacher_scale
        ss += tl.sum(s * s, axis=1)
        tt += tl.sum(t * t, axis=1)
        st += tl.sum(s * t, axis=1)
    return tl.sum(ss, axis=0), tl.sum(tt, axis=0), tl.sum(st, axis=0)


@triton.jit(do_not_specialize=["tokens", "length"])
def _forward_kernel(
    student, teacher, mask, mean, std,
    saved,  # out [3, N]: cosine, 1/|s|, 1/|t|
    tokens, length, student_outer, student_inner, teacher_outer, teacher_inner,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, TARGET: tl.constexpr, WINDOW: tl.constexpr,
    TILES: tl.constexpr, G: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    live = tl.load(mask + row) != 0
    student += _offset(row, length, student_outer, student_inner)
    teacher += _offset(row, length, teacher_outer, teacher_inner)
    ss, tt, st = _sums(
        student, teacher, live, mean, std, 1.0, 1.0, STUDENT, TEACHER, TARGET, WINDOW, TILES, G, V, False
    )
    student_scale = tl.where(ss < _INFINITY, 1.0, _SHRINK)
    teacher_scale = tl.where(tt < _INFINITY, 1.0, _SHRINK)
    if student_scale * teacher_scale < 1.0:
        # Rare, and in small steps: its registers must not weigh on the path above.
        ss, tt, st = _sums(
            student, teacher, live, mean, std, student_scale, teacher_scale,
            STUDENT, TEACHER, TARGET, WINDOW, TILES * (G // 32), 32, V, True,
        )  # fmt: skip
    inverse_s = _inverse_norm(ss, student_scale)
    inverse_t = _inverse_norm(tt, teacher_scale)
    cosine = tl.where((inverse_s > 0) & (inverse_t > 0), st * inverse_s * inverse_t, 0.0)
    saved += row
    tl.store(saved, cosine)
    saved += tokens
    tl.store(saved, inverse_s * student_scale)
    saved += tokens
    tl.store(saved, inverse_t * teacher_scale)


@triton.jit(do_not_specialize=["tokens"])
def _mean_kernel(cosines, mask, loss, count, tokens, BLOCK: tl.constexpr):
    # One program adds up in a fixed order: deterministic without atomics.
    index = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    counts = tl.zeros([BLOCK], tl.int32)
    for first in range(0, tokens, BLOCK):
        inside = first + index < tokens
        sums += tl.load(cosines + first + index, mask=inside, other=0.0)
        counts += tl.load(mask + first + index, mask=inside, other=0).to(tl.int32)
    total = tl.sum(counts, axis=0)
    tl.store(loss, -tl.div_rn(tl.sum(sums, axis=0), tl.maximum(total, 1).to(tl.float32)))
    tl.store(count, total)


@triton.jit
def _saved_row(saved, rows, tokens):
    pointers = saved + rows.to(tl.int64)
    cosine = tl.load(pointers, mask=rows < tokens, other=0.0)
    pointers += tokens
    inverse_s = tl.load(pointers, mask=rows < tokens, other=0.0)
    pointers += tokens
    inverse_t = tl.load(pointers, mask=rows < tokens, other=0.0)
    return cosine, inverse_s, inverse_t, (inverse_s > 0) & (inverse_t > 0)


@triton.jit(do_not_specialize=["tokens", "length"])
def _backward_kernel(
    grad, student, teacher, mean, std, saved, count,
    out,  # [N, D], contiguous
    tokens, length, student_outer, student_inner, teacher_outer, teacher_inner,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, WINDOW: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    # Cosines were taken in the student's width: elementwise, a program per tile.
    M: tl.constexpr = R * G
    m = tl.arange(0, M)
    rows = tl.program_id(0) * R + m // G  # [M]
    groups = tl.program_id(1) * G + m % G
    cosine, inverse_s, inverse_t, usable = _saved_row(saved, rows, tokens)
    factor = -tl.load(grad) / tl.maximum(tl.load(count), 1).to(tl.float32) * inverse_s
    student += _offset(rows, length, student_outer, student_inner)
    teacher += _offset(rows, length, teacher_outer, teacher_inner)
    s = _load_direct(student[:, None], usable[:, None], groups, None, None, STUDENT, V)
    t = _load(teacher[:, None], usable[:, None], groups, mean, std, TEACHER, STUDENT, WINDOW, M, V)
    difference = t * inverse_t[:, None] - s * inverse_s[:, None] * cosine[:, None]
    ds = tl.where(usable[:, None], factor[:, None] * difference, 0.0)
    columns = _columns(groups, V)
    pointers = out + rows.to(tl.int64)[:, None] * STUDENT + columns
    tl.store(pointers, ds.to(out.dtype.element_ty), mask=(rows < tokens)[:, None] & (columns < STUDENT))


@triton.jit(do_not_specialize=["tokens", "length"])
def _backward_resized_kernel(
    grad, student, teacher, mean, std, saved, count,
    out,  # [N, STUDENT], contiguous
    tokens, length, student_outer, student_inner, teacher_outer, teacher_inner,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, WINDOW: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    # The student was resized to u = A s in the teacher's width: ds = A' du. Each group of V student columns gathers
    # from the few target columns i whose hats reach it; their u_i are interpolated again from the student's row.
    M: tl.constexpr = R * G
    m = tl.arange(0, M)
    rows = tl.program_id(0) * R + m // G  # [M]
    groups = tl.program_id(1) * G + m % G
    left = groups * V
    cosine, inverse_s, inverse_t, usable = _saved_row(saved, rows, tokens)
    factor = -tl.load(grad) / tl.maximum(tl.load(count), 1).to(tl.float32) * inverse_s
    student += _offset(rows, length, student_outer, student_inner)
    teacher += _offset(rows, length, teacher_outer, teacher_inner)
    first = tl.maximum(((2 * left - 1) * TEACHER + STUDENT) // (2 * STUDENT), 0)  # see reach()
    ds = tl.zeros([M, V], tl.float32)
    for step in range(WINDOW):
        i = first + step
        read = usable & (i < TEACHER) & (left < STUDENT)
        t = _normalized(tl.load(teacher + i, mask=read, other=0.0).to(tl.float32), i, mean, std, read)
        base, fraction = _coordinate(i, STUDENT, TEACHER)
        low = tl.minimum(tl.maximum(base, 0), STUDENT - 1)
        high = tl.minimum(tl.maximum(base + 1, 0), STUDENT - 1)
        u = (1.0 - fraction) * tl.load(student + low, mask=read, other=0.0).to(tl.float32)
        u += fraction * tl.load(student + high, mask=read, other=0.0).to(tl.float32)
        du = tl.where(read, factor * (t * inverse_t - u * inverse_s * cosine), 0.0)  # [M]
        x = (base - left).to(tl.float32) + fraction
        x = tl.minimum(tl.maximum(x, (-left).to(tl.float32)), (STUDENT - 1 - left).to(tl.float32))
        ds += tl.maximum(1.0 - tl.abs(x[:, None] - tl.arange(0, V)[None, :]), 0.0) * du[:, None]
    columns = _columns(groups, V)
    pointers = out + rows.to(tl.int64)[:, None] * STUDENT + columns
    tl.store(pointers, ds.to(out.dtype.element_ty), mask=(rows < tokens)[:, None] & (columns < STUDENT))


@triton.jit
def _per_row(x, R: tl.constexpr, G: tl.constexpr):
    return tl.sum(tl.reshape(x, [R, G]), axis=1)  # [M] -> [R]


@triton.jit
def _per_group(x, R: tl.constexpr, G: tl.constexpr):
    return tl.reshape(tl.broadcast_to(x[:, None], [R, G]), [R * G])  # [R] -> [M]


@triton.jit(do_not_specialize=["tokens", "length", "steps"])
def _target_sum_kernel(
    teacher, mask, mean, std,
    partial,  # out [programs, TARGET]
    tokens, length, steps, teacher_outer, teacher_inner,
    TEACHER: tl.constexpr, TARGET: tl.constexpr, WINDOW: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = R * G
    m = tl.arange(0, M)
    groups = m % G
    total = tl.zeros([M, V], tl.float32)
    for step in range(steps):
        rows = (tl.program_id(0) * steps + step) * R + m // G
        live = tl.load(mask + rows, mask=rows < tokens, other=0) != 0
        start = teacher + _offset(rows, length, teacher_outer, teacher_inner)
        t = _load(start[:, None], live[:, None], groups, mean, std, TEACHER, TARGET, WINDOW, M, V)
        tt = _per_row(tl.sum(t * t, axis=1), R, G)
        scale = tl.where(tt < _INFINITY, tl.full([R], 1.0, tl.float32), _SHRINK)
        t *= _per_group(scale, R, G)[:, None]
        if tl.min(scale, axis=0) < 1.0:
            tt = _per_row(tl.sum(t * t, axis=1), R, G)
        inverse = _per_group(_inverse_norm(tt, scale), R, G)
        total += tl.where((inverse > 0)[:, None], t * inverse[:, None], 0.0)
    total = tl.sum(tl.reshape(total, [R, G, V]), axis=0)
    columns = _columns(tl.arange(0, G), V)
    tl.store(partial + tl.program_id(0).to(tl.int64) * TARGET + columns, total, mask=columns < TARGET)


Kind = Literal["forward", "backward", "transposed", "sum"]


@dataclass(frozen=True)
class Plan:
    """How rows are cut into tiles ``[R, G, V]``: constants of a compiled kernel."""

    window: int  # taps shared by the V columns of a group; 1 for equal widths
    tiles: int  # tiles in the width
    R: int
    G: int
    V: int
    num_warps: int


def window(width: int, target: int, vector: int) -> int:
    """Neighbouring inputs that ``vector`` neighbouring outputs of a resize from ``width`` to ``target`` read."""
    taps = 1
    for first in range(0, target, vector):
        low, high = (((2 * i + 1) * width - target) // (2 * target) for i in (first, first + vector - 1))
        taps = max(taps, high + 2 - low)
    return taps


def reach(width: int, target: int, vector: int) -> int:
    """Neighbouring outputs of a resize from ``width`` to ``target`` that read any of ``vector`` neighbouring inputs."""
    outputs = 1
    for j in range(0, width, vector):
        first = max(((2 * j - 1) * target + width) // (2 * width), 0)
        last = -((width - (2 * (j + vector) + 1) * target) // (2 * width)) - 1  # the last i left of j + vector
        outputs = max(outputs, min(last, target - 1) - first + 1)
    return outputs


@functools.cache
def plan(kind: Kind, width: int, source: int, itemsize: int) -> Plan:
    """Choose the tiles of a kernel.

    Args:
        kind: ``"forward"``, ``"backward"``, ``"transposed"`` (backward through a resized student) or ``"sum"``.
        width: Columns of the tiled rows.
        source: The other side's width.
        itemsize: Bytes per element of the tensor that is read or written in full vectors.
    """
    vector = max(16 // itemsize, 1)
    if kind == "transposed":
        taps = reach(width, source, vector)
    elif source > width:
        vector, taps = 1, 2
    else:
        taps = 1 if source == width else window(source, width, vector)
    if kind == "sum":
        columns = triton.next_power_of_2(max(width, 32 * vector))
        rows, num_warps = max(4096 // columns, 1), min(max(columns // 256, 1), 8)
    else:
        # One warp holds a forward tile in its registers; a resized one, with weights and taps there too, is smaller.
        sizes = (1024, 512, 256) if kind != "forward" or taps == 1 else (512, 256) if vector > 1 else (256,)
        columns = min(sizes, key=lambda size: -(-width // size) * size)  # the largest of those that waste least
        # Forward: a warp per row adds up without barriers. Backward: a thread per group, which shares a row's numbers.
        rows = 1 if kind == "forward" or vector == 1 else 2
        num_warps = 1 if kind == "forward" else max(columns * itemsize // 512, 1)
    return Plan(taps, -(-width // columns), rows, columns // vector, vector, num_warps)


# The op. Outputs beside the loss are what the backward needs: 12 bytes per token and one count.


def _rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """View ``[..., D]`` as ``[outer, length, D]``: the tensor, length and both strides."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    if x.dim() > 3:
        x = x.flatten(0, -3)
    while x.dim() < 3:
        x = x.unsqueeze(0)
    return x, x.shape[1], x.stride(0), x.stride(1)


# Decided by TRITON_INTERPRET when Triton is imported. The interpreter takes CPU tensors.
INTERPRETED = not isinstance(_forward_kernel, triton.JITFunction)


def unsupported(*inputs: Tensor | None) -> str | None:
    """Say why the kernels cannot take these inputs; None if they can."""
    tensors = [x for x in inputs if x is not None]
    if not INTERPRETED and not all(x.is_cuda for x in tensors):
        return "they run on CUDA tensors; on the CPU set TRITON_INTERPRET=1 before Triton is imported"
    if any(x.device != tensors[0].device for x in tensors):
        return "they take tensors on one device"
    if any(x.dtype not in (torch.float32, torch.bfloat16, torch.float16) for x in tensors):
        return "they take fp32, bf16 and fp16"
    if any(x.shape[-1] > MAX_WIDTH for x in tensors):
        return f"they take widths up to {MAX_WIDTH}"
    if any(x.shape[:-1].numel() >= 2**31 for x in tensors):
        return "they take fewer than 2^31 tokens"
    return None


def try_kernels() -> None:
    """Compile and run the smallest kernels, so that a broken installation shows here. Does nothing without a GPU."""
    if torch.cuda.is_available() and not INTERPRETED:
        states = torch.ones(1, 8, device="cuda", dtype=torch.bfloat16)  # what teachers run in
        mask = states[:, 0] > 0
        loss, saved, count = _forward(states, states, mask, None, None, False)
        _backward(loss, states, states, None, None, saved, count, False)
        _target_sum(states, mask, 8, None, None)


@torch.library.custom_op("let_composer::alignment_loss", mutates_args=())
def _forward(
    student: Tensor, teacher: Tensor, mask: Tensor, mean: Tensor | None, std: Tensor | None, resize_student: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = mask.numel()
    saved = student.new_empty(3, tokens, dtype=torch.float32)
    loss = student.new_empty((), dtype=torch.float32)
    count = student.new_empty((), dtype=torch.int32)
    direct, resized = (teacher, student) if resize_student else (student, teacher)
    width = direct.shape[-1]
    p = plan("forward", width, resized.shape[-1], direct.element_size())
    student, length, *student_strides = _rows(student)
    teacher, _, *teacher_strides = _rows(teacher)
    mask = mask.contiguous()
    with torch.cuda.device_of(student):
        if tokens:
            _forward_kernel[(tokens,)](
                student, teacher, mask, mean, std, saved, tokens, length, *student_strides, *teacher_strides,
                STUDENT=student.shape[-1], TEACHER=teacher.shape[-1], TARGET=width, WINDOW=p.window, TILES=p.tiles,
                G=p.G, V=p.V, num_warps=p.num_warps,
            )  # fmt: skip
        _mean_kernel[(1,)](saved, mask, loss, count, tokens, BLOCK=16384, num_warps=32)
    return loss, saved, count


@_forward.register_fake
def _(student, teacher, mask, mean, std, resize_student):
    return (
        student.new_empty((), dtype=torch.float32),
        student.new_empty(3, mask.numel(), dtype=torch.float32),
        student.new_empty((), dtype=torch.int32),
    )


@torch.library.custom_op("let_composer::alignment_loss_backward", mutates_args=())
def _backward(
    grad: Tensor, student: Tensor, teacher: Tensor, mean: Tensor | None, std: Tensor | None, saved: Tensor,
    count: Tensor, resize_student: bool,
) -> Tensor:  # fmt: skip
    out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    tokens = saved.shape[1]
    student, length, *student_strides = _rows(student)
    teacher, _, *teacher_strides = _rows(teacher)
    width, source = student.shape[-1], teacher.shape[-1]
    transposed = resize_student and width != source
    p = plan("transposed" if transposed else "backward", width, source, out.element_size())
    kernel = _backward_resized_kernel if transposed else _backward_kernel
    if tokens:
        with torch.cuda.device_of(student):
            kernel[(triton.cdiv(tokens, p.R), p.tiles)](
                grad, student, teacher, mean, std, saved, count, out,
                tokens, length, *student_strides, *teacher_strides,
                STUDENT=width, TEACHER=source, WINDOW=p.window, R=p.R, G=p.G, V=p.V, num_warps=p.num_warps,
            )  # fmt: skip
    return out


@_backward.register_fake
def _(grad, student, teacher, mean, std, saved, count, resize_student):
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _setup_context(ctx, inputs, output):
    student, teacher, _, mean, std, ctx.resize_student = inputs
    _, saved, count = output
    ctx.mark_non_differentiable(saved, count)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(student, teacher, mean, std, saved, count)


def _differentiate(ctx, grad, *_):
    gradient = None if grad is None else _backward(grad, *ctx.saved_tensors, ctx.resize_student)
    return gradient, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


@torch.library.custom_op("let_composer::target_sum", mutates_args=())
def _target_sum(teacher: Tensor, mask: Tensor, width: int, mean: Tensor | None, std: Tensor | None) -> Tensor:
    tokens = mask.numel()
    teacher, length, *strides = _rows(teacher)
    p = plan("sum", width, teacher.shape[-1], teacher.element_size())
    # At most 512 partial sums, whatever the device: the order of additions depends on the shape alone.
    steps = max(triton.cdiv(tokens, 512 * p.R), triton.cdiv(16, p.R))
    partial = teacher.new_empty(triton.cdiv(tokens, steps * p.R), width, dtype=torch.float32)
    if tokens:
        with torch.cuda.device_of(teacher):
            _target_sum_kernel[(partial.shape[0],)](
                teacher, mask.contiguous(), mean, std, partial, tokens, length, steps, *strides,
                TEACHER=teacher.shape[-1], TARGET=width, WINDOW=p.window,
                R=p.R, G=p.G, V=p.V, num_warps=p.num_warps,
            )  # fmt: skip
    return partial.sum(dim=0)


@_target_sum.register_fake
def _(teacher, mask, width, mean, std):
    return teacher.new_empty(width, dtype=torch.float32)


def alignment_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    teacher_mean: Tensor | None = None,
    teacher_std: Tensor | None = None,
    resize: str = "student",
) -> Tensor:
    """:func:`let_composer.loss.reference.alignment_loss` in one pass over the states, in fp32."""
    return _forward(student, teacher, mask, teacher_mean, teacher_std, resize == "student")[0]


def target_sum(
    teacher: Tensor, mask: Tensor, width: int, teacher_mean: Tensor | None = None, teacher_std: Tensor | None = None
) -> Tensor:
    """:func:`let_composer.loss.reference.target_sum` in one pass over the teacher's states, in fp32."""
    return _target_sum(teacher, mask, width, teacher_mean, teacher_std)
