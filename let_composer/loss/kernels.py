"""The alignment loss as Triton kernels behind one ``torch.library`` op; ``reference.py`` is their specification."""

# Triton's decorators hide from pyright what a kernel accepts and returns.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import functools
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from let_composer.loss.reference import EPSILON

__all__ = ["INTERPRETED", "MAX_WIDTH", "alignment", "try_kernels", "unsupported"]

MAX_WIDTH = 16384

# A program holds a tile [M, V] of R rows: M = R * G groups, V neighbouring columns that one thread moves in one 128-bit
# access. N tokens, D the width in which cosines are taken; the other side is resized to it.
#
#   l = -<s, t> / (|s||t|)        L = sum over mask of l / tokens in mask
#   dL/ds = -g / (n |s|) (t / |t| - cos s / |s|)        saved per token: cos, 1/|s|, 1/|t| (0: no direction)
#
# Masks: "used" is a row that counts and has a direction, "inside" an element that is read or written.
#
# Resizing. Output column c sits at input coordinate x = ((2c + 1) W - D) / 2D, an exact fraction; it takes input j with
# the hat weight max(0, 1 - |x - j|). Going up, the V columns of a group share a window of few inputs (4 to 6 if V = 8),
# read once per group and spread in registers. Clamping the index replicates the edge, which equals clamping x. Going
# down, V is 1 and the window is the two taps.


@triton.jit
def _read(row, columns, inside, mean, std):
    """Elements of a row, normalised, 0 outside. ``row`` is a scalar or [M, 1], like ``used`` and ``groups`` below."""
    x = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
    if mean is not None:
        x -= tl.load(mean + columns, mask=inside, other=0.0).to(tl.float32)
    if std is not None:
        x /= tl.load(std + columns, mask=inside, other=1.0).to(tl.float32)
    return x


@triton.jit
def _coordinate(column, WIDTH: tl.constexpr, TARGET: tl.constexpr):
    """Input coordinate of an output column: floor and fraction."""
    numerator = (2 * column + 1) * WIDTH - TARGET
    floor = (numerator + 2 * TARGET) // (2 * TARGET) - 1  # negative only at the left edge
    return floor, (numerator - floor * (2 * TARGET)).to(tl.float32) / (2 * TARGET)


@triton.jit
def _load(
    row, used, groups, mean, std,
    WIDTH: tl.constexpr, TARGET: tl.constexpr, WINDOW: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Columns of a row of WIDTH, normalised and resized to TARGET: [M, V]."""
    columns = groups * V + tl.arange(0, V)[None, :]
    if WIDTH == TARGET:
        inside = used & (columns < WIDTH)
        out = _read(row, columns, inside, mean, std)
    else:
        inside = used & (groups * V < TARGET)
        if (32 * V * WIDTH) % TARGET == 0:
            # The pattern repeats every 32 groups, so the lanes of a warp keep their weights over all tiles and rows.
            base, x = _coordinate(groups % 32 * V, WIDTH, TARGET)
            base += groups // 32 * (32 * V * WIDTH // TARGET)
        else:
            base, x = _coordinate(groups * V, WIDTH, TARGET)
        x = x + tl.arange(0, V)[None, :] * (WIDTH / TARGET)  # [M, V], relative to base
        out = tl.zeros_like(x)
        for tap in tl.static_range(WINDOW):
            index = tl.minimum(tl.maximum(base + tap, 0), WIDTH - 1)
            out += tl.maximum(1.0 - tl.abs(x - tap), 0.0) * _read(row, index, inside, mean, std)
        if TARGET % V != 0:
            out = tl.where(columns < TARGET, out, 0.0)
    return out


@triton.jit
def _inverse_norm(squares, EPSILON: tl.constexpr):
    """Inverse norm, 0 for a row without a direction."""
    norm = tl.sqrt_rn(squares)
    used = (squares < float("inf")) & (norm >= EPSILON)
    return tl.where(used, tl.div_rn(1.0, tl.where(used, norm, 1.0)), 0.0)


@triton.jit(do_not_specialize=["tokens"])
def _forward_kernel(
    student, teacher, mask, mean, std,
    saved,  # out [3, N]: cosine, 1/|s| (0 unless both sides have a direction), 1/|t|
    tokens, student_stride, teacher_stride,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, TARGET: tl.constexpr, WINDOW: tl.constexpr,
    TILES: tl.constexpr, G: tl.constexpr, V: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    used = tl.load(mask + row) != 0
    student += row * student_stride
    teacher += row * teacher_stride
    ss = tl.zeros([G], tl.float32)
    tt = tl.zeros([G], tl.float32)
    st = tl.zeros([G], tl.float32)
    # Few loads are in flight when each brings one element to a thread; only then does unrolling help.
    for tile in tl.range(0, TILES, loop_unroll_factor=12 if V == 1 else 1):
        groups = tile * G + tl.arange(0, G)[:, None]
        s = _load(student, used, groups, None, None, STUDENT, TARGET, WINDOW, V)
        t = _load(teacher, used, groups, mean, std, TEACHER, TARGET, WINDOW, V)
        ss += tl.sum(s * s, axis=1)
        tt += tl.sum(t * t, axis=1)
        st += tl.sum(s * t, axis=1)
    inverse_s = _inverse_norm(tl.sum(ss, axis=0), EPSILON)
    inverse_t = _inverse_norm(tl.sum(tt, axis=0), EPSILON)
    inverse_s = tl.where(inverse_t > 0, inverse_s, 0.0)
    cosine = tl.where(inverse_s > 0, tl.sum(st, axis=0) * inverse_s * inverse_t, 0.0)
    saved += row
    tl.store(saved, cosine)
    saved += tokens
    tl.store(saved, inverse_s)
    saved += tokens
    tl.store(saved, inverse_t)


@triton.jit(do_not_specialize=["tokens"])
def _backward_kernel(
    grad, student, teacher, mean, std, saved, counts,
    out,  # [N, STUDENT], contiguous
    tokens, student_stride, teacher_stride,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, TARGET: tl.constexpr, WINDOW: tl.constexpr,
    R: tl.constexpr, G: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, R * G)[:, None]
    rows = (tl.program_id(0) * R + m // G).to(tl.int64)
    groups = tl.program_id(1) * G + m % G
    saved += rows
    cosine = tl.load(saved, mask=rows < tokens, other=0.0)
    saved += tokens
    inverse_s = tl.load(saved, mask=rows < tokens, other=0.0)
    saved += tokens
    inverse_t = tl.load(saved, mask=rows < tokens, other=0.0)
    used = inverse_s > 0
    factor = -tl.load(grad) / tl.maximum(tl.load(counts), 1).to(tl.float32) * inverse_s
    weight_s = inverse_s * cosine
    student += rows * student_stride
    teacher += rows * teacher_stride
    if STUDENT == TARGET:
        s = _load(student, used, groups, None, None, STUDENT, TARGET, 1, V)
        t = _load(teacher, used, groups, mean, std, TEACHER, TARGET, WINDOW, V)
        ds = tl.where(used, factor * (t * inverse_t - s * weight_s), 0.0)
    else:
        # The student was resized to u = A s: ds = A' du. Each group of V student columns gathers from the few target
        # columns i whose hats reach it; their u_i are interpolated again from the student's row.
        left = groups * V
        first = tl.maximum(((2 * left - 1) * TARGET + STUDENT) // (2 * STUDENT), 0)  # see reach()
        ds = tl.zeros([R * G, V], tl.float32)
        for step in range(WINDOW):
            i = first + step
            inside = used & (i < TARGET) & (left < STUDENT)
            t = _read(teacher, i, inside, mean, std)
            base, fraction = _coordinate(i, STUDENT, TARGET)
            low = tl.minimum(tl.maximum(base, 0), STUDENT - 1)
            high = tl.minimum(tl.maximum(base + 1, 0), STUDENT - 1)
            u = (1.0 - fraction) * _read(student, low, inside, None, None)
            u += fraction * _read(student, high, inside, None, None)
            du = tl.where(inside, factor * (t * inverse_t - u * weight_s), 0.0)  # [M, 1]
            x = (base - left).to(tl.float32) + fraction
            x = tl.minimum(tl.maximum(x, (-left).to(tl.float32)), (STUDENT - 1 - left).to(tl.float32))
            ds += tl.maximum(1.0 - tl.abs(x - tl.arange(0, V)[None, :]), 0.0) * du
    columns = groups * V + tl.arange(0, V)[None, :]
    out += rows * STUDENT + columns
    tl.store(out, ds.to(out.dtype.element_ty), mask=(rows < tokens) & (columns < STUDENT))


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
    """Most inputs that ``vector`` neighbouring outputs of a resize from ``width`` to ``target`` read."""
    floor = [((2 * i + 1) * width - target) // (2 * target) for i in range(target + vector)]
    return max(floor[i + vector - 1] + 2 - floor[i] for i in range(0, target, vector))


def reach(width: int, target: int, vector: int) -> int:
    """Most outputs of a resize from ``width`` to ``target`` that read any of ``vector`` neighbouring inputs.

    Output i sits at x = ((2i + 1) width - target) / 2 target and reads j where j - 1 < x < j + 1. From 8 to 4, for the
    inputs 2 and 3: x = 0.5, 2.5, 4.5, 6.5, of which 2.5 alone lies between 1 and 4, so one output reads them.
    """
    x = [(2 * i + 1) * width - target for i in range(target)]  # times 2 target
    firsts = range(0, width, vector)
    return max(bisect_left(x, 2 * target * (j + vector)) - bisect_right(x, 2 * target * (j - 1)) for j in firsts)


@functools.cache
def plan(kind: Literal["forward", "backward"], student: int, teacher: int, resize_student: bool, itemsize: int) -> Plan:
    """Choose the tiles of a kernel.

    Args:
        kind: Which kernel. The forward's tiles have the width in which cosines are taken, the backward's the student's.
        student: Width.
        teacher: Width.
        resize_student: Whether cosines are taken in the teacher's width.
        itemsize: Bytes per element of the tensor that is read or written in full vectors.
    """
    width, source = (teacher, student) if resize_student else (student, teacher)
    vector = 16 // itemsize
    if width == source:
        taps = 1
    elif kind == "backward" and resize_student:
        width, taps = student, reach(student, teacher, vector)
    elif source > width:  # a thread has one column, or the taps of a warp would fall into few banks
        vector, taps = 1, 2
    else:
        taps = window(source, width, vector)
    # One warp holds a forward tile in its registers. A resized one, with weights and taps there too, is smaller.
    sizes = (1024, 512, 256)
    if kind == "forward" and taps > 1:
        sizes = (512, 256) if vector > 1 else (32,)
    columns = min(sizes, key=lambda size: -(-width // size) * size)  # the largest of those that waste least
    # Forward: a warp per row adds up without barriers. Backward: a thread per group, which shares a row's numbers.
    rows = 1 if kind == "forward" or vector == 1 else 2
    num_warps = 1 if kind == "forward" else max(columns * itemsize // 512, 1)
    return Plan(taps, -(-width // columns), rows, columns // vector, vector, num_warps)


# The op. Outputs beside the loss are what the backward needs: 12 bytes per token and two counts.


def _rows(x: Tensor) -> Tensor:
    """View ``[..., D]`` as ``[N, D]``, whose last dimension is contiguous."""
    return (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, x.shape[-1])


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
    return None


def try_kernels() -> None:
    """Compile and run the smallest kernels, so that a broken installation shows here. Does nothing without a GPU."""
    if torch.cuda.is_available() and not INTERPRETED:
        states = torch.ones(1, 8, device="cuda", dtype=torch.bfloat16)  # what teachers run in
        mask = states[:, 0] > 0
        loss, saved, counts = _forward(states, states, mask, None, None, False)
        _backward(loss, states, states, None, None, saved, counts, False)


@torch.library.custom_op("let_composer::alignment_loss", mutates_args=())
def _forward(
    student: Tensor, teacher: Tensor, mask: Tensor, mean: Tensor | None, std: Tensor | None, resize_student: bool
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = mask.numel()
    saved = student.new_empty(3, tokens, dtype=torch.float32)  # cosine, 1/|s|, 1/|t|
    direct = teacher if resize_student else student
    p = plan("forward", student.shape[-1], teacher.shape[-1], resize_student, direct.element_size())
    student, teacher = _rows(student), _rows(teacher)
    mask = mask.contiguous()
    if tokens:
        with torch.cuda.device_of(student):
            _forward_kernel[(tokens,)](
                student, teacher, mask, mean, std, saved, tokens, student.stride(0), teacher.stride(0),
                STUDENT=student.shape[-1], TEACHER=teacher.shape[-1], TARGET=direct.shape[-1], WINDOW=p.window,
                TILES=p.tiles, G=p.G, V=p.V, EPSILON=EPSILON, num_warps=p.num_warps,
            )  # fmt: skip
    counts = torch.stack([mask.sum(), (saved[1] > 0).sum()])  # of the mask, and with a direction on both sides
    return -saved[0].sum() / counts[0].clamp(min=1), saved, counts


@_forward.register_fake
def _(student, teacher, mask, mean, std, resize_student):
    loss, saved = (student.new_empty(shape, dtype=torch.float32) for shape in ((), (3, mask.numel())))
    return loss, saved, student.new_empty(2, dtype=torch.int64)


@torch.library.custom_op("let_composer::alignment_loss_backward", mutates_args=())
def _backward(
    grad: Tensor, student: Tensor, teacher: Tensor, mean: Tensor | None, std: Tensor | None, saved: Tensor,
    counts: Tensor, resize_student: bool,
) -> Tensor:  # fmt: skip
    out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    tokens = saved.shape[1]
    student, teacher = _rows(student), _rows(teacher)
    width, source = student.shape[-1], teacher.shape[-1]
    p = plan("backward", width, source, resize_student, out.element_size())
    if tokens:
        with torch.cuda.device_of(student):
            _backward_kernel[(triton.cdiv(tokens, p.R), p.tiles)](
                grad, student, teacher, mean, std, saved, counts, out, tokens, student.stride(0), teacher.stride(0),
                STUDENT=width, TEACHER=source, TARGET=source if resize_student else width, WINDOW=p.window,
                R=p.R, G=p.G, V=p.V, num_warps=p.num_warps,
            )  # fmt: skip
    return out


@_backward.register_fake
def _(grad, student, teacher, mean, std, saved, counts, resize_student):
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _setup_context(ctx, inputs, output):
    student, teacher, _, mean, std, ctx.resize_student = inputs
    _, saved, counts = output
    ctx.mark_non_differentiable(saved, counts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(student, teacher, mean, std, saved, counts)


def _differentiate(ctx, grad, *_):
    gradient = None if grad is None else _backward(grad, *ctx.saved_tensors, ctx.resize_student)
    return gradient, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def alignment(
    student: Tensor, teacher: Tensor, mask: Tensor, mean: Tensor | None, std: Tensor | None, resize: str
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`let_composer.loss.reference.alignment` in one pass over the states, in fp32."""
    loss, saved, counts = _forward(student, teacher, mask, mean, std, resize == "student")
    return loss, counts[1], saved[2].view(mask.shape)
