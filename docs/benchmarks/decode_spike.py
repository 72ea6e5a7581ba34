"""Which code layout decodes fast enough inside a fused reconstruct-and-attend kernel? A spike, not product code.

    python docs/benchmarks/decode_spike.py --out spike.json     # on a GPU, under four minutes
    python docs/benchmarks/decode_spike.py --interpret          # every kernel against PyTorch, small, without a GPU
    python docs/benchmarks/decode_spike.py --compile 90         # every kernel compiled for sm_90, without a GPU

A record is `payload` bytes of codes, perhaps padding, and an fp16 gain in its last two bytes. Components come in blocks
of BK of one rate (bits a component), rates static and falling. Every layout has the same bytes and the same components:

    F   fp16 latents, no code: what the form costs when decoding is free but memory is not
    A   scalar codes of 8, 4, 2, 1 bits, a codebook for each component: gather table[component, code]
    B   the same codes, an odd polynomial of the code in fp16 arithmetic
    Bt  the same codes, one gathered codebook for each width
    C   scalar codes of any width from bit planes, the polynomial of B
    D   a byte indexes 256 vectors of n = 8 / rate consecutive components; D2 a nibble, 16 vectors, n = 4 / rate
    E   bit-shift trellis: the hash (multiply-add, sum of bytes) of the 12 bits that end at a component's position
    E2  the same with 8 bits and one table of 256 gathered from global memory; E2s gathers it from shared memory

The form `sum` decodes and takes a weighted sum over components; `dot` multiplies by a block of 256 columns of an
up-projection and sums the rows. Scales of components are in the weights or the up-projection, the gain comes last;
`+ref` adds gathered reference latents to each component instead, as the product will.
"""

import argparse
import concurrent.futures as futures
import json
import multiprocessing
import os
import statistics
import sys
import time
from typing import NamedTuple

INTERPRET = "--interpret" in sys.argv
if INTERPRET:
    os.environ["TRITON_INTERPRET"] = "1"  # before @triton.jit is evaluated

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

# name: (BK, width of the dense token, bytes of a record, {layouts: blocks of BK components at each rate})
SHAPES = {
    "smol-48": (32, 384, 48, {"C": {3: 2, 2: 1, 1: 3}, "E": {3: 1, 2: 3, 1: 2}, "": {4: 1, 2: 2, 1: 3}}),
    "llama-256": (
        64,
        2048,
        256,
        {
            "C": {8: 1, 4: 1, 3: 1, 2: 4, 1: 8},
            "D2": {4: 3, 2: 7, 1: 5},
            "E": {4: 2, 3: 2, 2: 6, 1: 5},
            "": {8: 1, 4: 1, 2: 6, 1: 7},
        },
    ),
    "llama-400": (
        64,
        2048,
        400,
        {
            "C": {8: 1, 6: 1, 5: 1, 4: 2, 3: 3, 2: 4, 1: 4},
            "D": {8: 2, 4: 4, 2: 6, 1: 4},
            "D2": {4: 9, 2: 5, 1: 2},
            "E": {4: 8, 3: 2, 2: 4, 1: 2},
            "": {8: 1, 4: 5, 2: 10},
        },
    ),
}
INTERPRETED = tl.constexpr(INTERPRET)
LAYOUTS = ["F", "A", "B", "Bt", "C", "D", "D2", "E", "E2", "E2s"]
TILINGS = {"sum": [(32, 2, 2), (64, 4, 2)], "dot": [(64, 4, 2), (64, 4, 3), (128, 8, 3)]}  # tokens, warps, stages
REFERENCES = 64 if INTERPRET else 1024  # fewer than tokens, so that a mix-up of the two shows


# ---- kernels ---------------------------------------------------------------------------------------------------------
@triton.jit
def at(tok, unit, STRIDE: tl.constexpr, TILED: tl.constexpr):
    """Index of a record's unit (byte or word): records side by side, or tiles of 64 tokens, the token fastest."""
    if TILED:
        return (tok // 64) * (STRIDE * 64) + unit * 64 + tok % 64
    else:
        return tok * STRIDE + unit


@triton.jit
def unpack(x, BITS: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr):
    """[BT, BK * W / BITS] units of BITS bits -> [BT, BK] codes of W bits, lowest first; stays within a thread."""
    if BITS == 32:
        x = tl.join(x, x >> 16)
        x = tl.join(x, x >> 8)
    if W <= 4:
        x = tl.join(x, x >> 4)
    if W <= 2:
        x = tl.join(x, x >> 2)
    if W <= 1:
        x = tl.join(x, x >> 1)
    return tl.reshape(x, [BT, BK]) & ((1 << W) - 1)


@triton.jit
def compand(code, W: tl.constexpr):
    """An odd polynomial of y = (2 code - (2^W - 1)) / 2^W; the code goes into the mantissa of an fp16 as it is."""
    y = ((code << 1) | ((25 - W) << 10)).to(tl.int16).to(tl.float16, bitcast=True)
    y = y - (2.0 ** (10 - W) + 1.0 - 0.5**W)
    if W > 4:
        s = y * y
        y = y * (1.5 + s * (0.5 + s * 1.5))
    elif W > 2:
        y = y * (1.93 + y * y * 0.9)
    return y


@triton.jit
def gather(tab, x, N: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, ASM: tl.constexpr):
    """N entries of tab from each x on, [BT, BK] in all. In assembly, which leaves x where decoding put it; tl.load
    would move it through shared memory to the layout that suits a coalesced load, which no gather is."""
    if not ASM:
        if N == 1:
            return tl.load(tab + x)
        else:
            return tl.reshape(tl.load(tab + x[:, :, None] + tl.arange(0, N)[None, None, :]), [BT, BK])
    elif N == 1:
        x = tl.inline_asm_elementwise("ld.global.nc.u16 $0, [$1];", "=h,l", [(tab + x).to(tl.int64)], tl.int16, True, 1)
        return x.to(tl.float16, bitcast=True)
    else:
        x = (tab + x).to(tl.int64)
        if N == 2:
            x = tl.inline_asm_elementwise("ld.global.nc.b32 $0, [$1];", "=r,l", [x], tl.int32, True, 1)
        elif N == 4:
            x, y = tl.inline_asm_elementwise(
                "ld.global.nc.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [x], (tl.int32, tl.int32), True, 1
            )
            x = tl.join(x, y)
        else:
            x, y, z, w = tl.inline_asm_elementwise(
                "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];",
                "=r,=r,=r,=r,l",
                [x],
                (tl.int32, tl.int32, tl.int32, tl.int32),
                True,
                1,
            )
            x = tl.join(tl.join(x, z), tl.join(y, w))
        x = tl.join(x.to(tl.int16), (x >> 16).to(tl.int16))
        return tl.reshape(x, [BT, BK]).to(tl.float16, bitcast=True)


# fmt: off
@triton.jit
def windows(
    codes, tok, first, W: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, STRIDE: tl.constexpr,
    TILED: tl.constexpr,
):
    """The L bits of the record's bit stream that end with each component's W bits; before the stream lie zeros."""
    if W == 3:  # 32 components in three words
        j = first + 3 * tl.arange(0, BK // 32)[None, :]
        p = tl.load(codes + at(tok, j - 1, STRIDE, TILED), mask=j > 0, other=0).to(tl.uint32, bitcast=True)
        a = tl.load(codes + at(tok, j, STRIDE, TILED)).to(tl.uint32, bitcast=True).to(tl.uint64)
        b = tl.load(codes + at(tok, j + 1, STRIDE, TILED)).to(tl.uint32, bitcast=True).to(tl.uint64)
        c = tl.load(codes + at(tok, j + 2, STRIDE, TILED)).to(tl.uint32, bitcast=True).to(tl.uint64)
        x = tl.join((p >> 16).to(tl.uint64) | (a << 16) | (b << 48), b | (c << 32)) >> (16 + W - L)
        x = tl.join(x, x >> 24)
        x = tl.join(x, x >> 12)
        x = tl.join(x, x >> 6)
        x = tl.join(x, x >> 3)
    else:
        j = first + tl.arange(0, BK * W // 32)[None, :]
        p = tl.load(codes + at(tok, j - 1, STRIDE, TILED), mask=j > 0, other=0).to(tl.uint32, bitcast=True)
        a = tl.load(codes + at(tok, j, STRIDE, TILED)).to(tl.uint32, bitcast=True)
        x = ((a.to(tl.uint64) << 32) | p.to(tl.uint64)) >> (32 + W - L)
        x = tl.join(x, x >> 16)
        x = tl.join(x, x >> 8)
        x = tl.join(x, x >> 4)
        if W <= 2:
            x = tl.join(x, x >> 2)
        if W == 1:
            x = tl.join(x, x >> 1)
    return tl.reshape(x, [BT, BK]).to(tl.uint32) & ((1 << L) - 1)


@triton.jit
def decode(
    codes, tab, lut, latents, tok, i, LAYOUT: tl.constexpr, W: tl.constexpr, OFF: tl.constexpr, COMP: tl.constexpr,
    TOFF: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr, STRIDE: tl.constexpr,
    TILED: tl.constexpr, ASM: tl.constexpr,
):
    """Block i of a segment of rate W that starts at unit OFF and component COMP: [BT, BK] fp16."""
    UNITS: tl.constexpr = BK * W // (8 * UNIT)
    first = OFF + i * UNITS
    if LAYOUT == "F":
        return tl.load(latents + tok * R + COMP + i * BK + tl.arange(0, BK)[None, :])
    elif LAYOUT[0] == "E":
        if LAYOUT == "E":
            x = windows(codes, tok, first, W, 12, BT, BK, STRIDE, TILED) * 34038481 + 76625530
            if not INTERPRETED:  # the sum of bytes, into the mantissa of an fp16 that starts at 1024
                x = tl.inline_asm_elementwise("dp4a.u32.u32 $0, $1, 0x01010101, 25600;", "=r,r", [x], tl.int32, True, 1)
            else:
                x = (x & 0x00FF00FF) + ((x >> 8) & 0x00FF00FF)
                x = (((x + (x >> 16)) & 0xFFFF) + 25600).to(tl.int32)
            return x.to(tl.int16).to(tl.float16, bitcast=True) - 1534.0
        else:
            x = windows(codes, tok, first, W, 8, BT, BK, STRIDE, TILED).to(tl.int32)
            if LAYOUT == "E2":
                return gather(tab, x, 1, BT, BK, ASM)
            else:
                return tl.reshape(tl.gather(lut, tl.reshape(x, [BT * BK]), 0), [BT, BK])
    elif LAYOUT == "C":
        PLANE: tl.constexpr = BK // (8 * UNIT)
        code = tl.zeros([BT, BK], tl.int32)
        for p in tl.static_range(W):
            x = tl.load(codes + at(tok, first + p * PLANE + tl.arange(0, PLANE)[None, :], STRIDE, TILED)).to(tl.int32)
            code |= unpack(x, 8 * UNIT, 1, BT, BK) << p
        return compand(code, W)
    else:
        x = tl.load(codes + at(tok, first + tl.arange(0, UNITS)[None, :], STRIDE, TILED)).to(tl.int32)
        if LAYOUT[0] == "D":
            BITS: tl.constexpr = 8 if LAYOUT == "D" else 4
            N: tl.constexpr = BITS // W  # components a code
            G: tl.constexpr = BK // N
            x = unpack(x, 8 * UNIT, BITS, BT, G)
            x = TOFF + (((i * G + tl.arange(0, G)[None, :]) << BITS) + x) * N
            return gather(tab, x, N, BT, BK, ASM)
        else:
            x = unpack(x, 8 * UNIT, W, BT, BK)
            if LAYOUT == "A":
                return gather(tab, TOFF + ((i * BK + tl.arange(0, BK)[None, :]) << W) + x, 1, BT, BK, ASM)
            elif LAYOUT == "Bt":
                return gather(tab, TOFF + x, 1, BT, BK, ASM)
            else:
                return compand(x, W)


@triton.jit
def segment(
    acc, codes, tab, lut, latents, up, ids, gain, tok, N: tl.constexpr, LAYOUT: tl.constexpr, DOT: tl.constexpr,
    REF: tl.constexpr, W: tl.constexpr, OFF: tl.constexpr, COMP: tl.constexpr, TOFF: tl.constexpr, R: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
    STRIDE: tl.constexpr, TILED: tl.constexpr, ASM: tl.constexpr,
):
    """Add the segment's N blocks to acc: [BT, BN] products, or [BT] sums."""
    comp = COMP + tl.arange(0, BK)
    if DOT:
        col = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    else:
        part = tl.zeros([BT, BK], tl.float32)
    for i in range(N):
        z = decode(codes, tab, lut, latents, tok, i, LAYOUT, W, OFF, COMP, TOFF, R, BT, BK, UNIT, STRIDE, TILED, ASM)
        if REF:
            z = z * gain + tl.load(latents + ids * R + (comp + i * BK)[None, :])
        if DOT:
            acc = tl.dot(z, tl.load(up + (comp + i * BK)[:, None] * WIDTH + col), acc)
        else:
            part += z.to(tl.float32) * tl.load(up + comp + i * BK)[None, :].to(tl.float32)
    if DOT:
        return acc
    else:
        return acc + tl.sum(part, 1)


@triton.jit
def spike(
    codes, tab, latents, up, refs, out, SEGS: tl.constexpr, LAYOUT: tl.constexpr, DOT: tl.constexpr,
    REF: tl.constexpr, T: tl.constexpr, R: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    WIDTH: tl.constexpr, UNIT: tl.constexpr, STRIDE: tl.constexpr, TILED: tl.constexpr, ASM: tl.constexpr,
):
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    tok = rows[:, None]
    if UNIT == 4:
        gain = (tl.load(codes + at(tok, STRIDE - 1, STRIDE, TILED)) >> 16).to(tl.int16)
    else:
        low = tl.load(codes + at(tok, STRIDE - 2, STRIDE, TILED)).to(tl.int16)
        gain = low | (tl.load(codes + at(tok, STRIDE - 1, STRIDE, TILED)).to(tl.int16) << 8)
    gain = gain.to(tl.float16, bitcast=True)
    ids = tok
    if REF:
        ids = tl.load(refs + tok)
    lut = 0
    if LAYOUT == "E2s":
        lut = tl.load(tab + tl.arange(0, 256))
    if DOT:
        acc = tl.zeros([BT, BN], tl.float32)
    else:
        acc = tl.zeros([BT], tl.float32)
    for s in tl.static_range(len(SEGS)):
        acc = segment(
            acc, codes, tab, lut, latents, up, ids, gain, tok, SEGS[s][1], LAYOUT, DOT, REF, SEGS[s][0], SEGS[s][2],
            SEGS[s][3], SEGS[s][4], R, BT, BK, BN, WIDTH, UNIT, STRIDE, TILED, ASM,
        )
    if DOT:
        acc = tl.sum(acc, 1)
    if not REF:
        acc = acc * tl.reshape(gain, [BT]).to(tl.float32)
    tl.store(out + tl.program_id(1) * T + rows, acc)
# fmt: on


# ---- records, what they mean, and the arguments of a kernel ----------------------------------------------------------
def segments(shape, layout, unit=4):
    """((rate, blocks, first unit, first component, first entry of the table), ...)"""
    bk, _, _, rates = SHAPES[shape]
    rates = rates.get("E" if layout[0] == "E" else layout, rates[""])
    found, byte, comp, entry = [], 0, 0, 0
    for w, n in rates.items():
        found.append((w, n, byte // unit, comp, entry))
        byte, comp = byte + n * bk * w // 8, comp + n * bk
        entry += {"A": n * bk << w, "Bt": 1 << w, "D": n * bk * 256, "D2": n * bk * 16}.get(layout, 0)
    return tuple(found), byte, comp, max(entry, 256)


def reference(layout, segs, bk, payload, tab):
    """Latents [T, R] of records [T, bytes], from their bits one by one."""
    bits = ((payload[:, :, None] >> torch.arange(8, device=payload.device, dtype=torch.uint8)) & 1).flatten(1).float()

    def number(b):
        return (b @ 2.0 ** torch.arange(b.shape[-1], device=b.device)).long()

    found, done = [], 0
    for w, n, _, _, entry in segs:
        t, r = len(bits), n * bk
        b = bits[:, done : done + r * w]
        if layout[0] == "E":
            length = 12 if layout == "E" else 8
            ends = done + w * torch.arange(1, r + 1, device=bits.device)
            where = ends[:, None] + torch.arange(length, device=bits.device)
            code = number(torch.nn.functional.pad(bits, (length, 0))[:, where])
            x = (code * 34038481 + 76625530) & 0xFFFFFFFF
            z = sum((x >> s) & 255 for s in (0, 8, 16, 24)).double() - 510 if layout == "E" else tab[code]
        elif layout[0] == "D":
            size = 8 if layout == "D" else 4
            code = number(b.reshape(t, -1, size))
            table = tab[entry : entry + (r << size)].reshape(-1, 2**size, size // w)
            z = table[torch.arange(code.shape[1], device=code.device), code].reshape(t, r)
        else:
            planes = b.reshape(t, n, w, bk).transpose(2, 3) if layout == "C" else b
            code = number(planes.reshape(t, r, w))
            if layout == "A":
                z = tab[entry + (torch.arange(r, device=code.device) << w) + code]
            elif layout == "Bt":
                z = tab[entry + code]
            else:
                y = (2 * code.double() - (2**w - 1)) / 2**w
                z = y * (1.5 + 0.5 * y**2 + 1.5 * y**4) if w > 4 else y * (1.93 + 0.9 * y**2) if w > 2 else y
        found.append(z.double())
        done += r * w
    return torch.cat(found, 1)


class Case(NamedTuple):
    shape: str
    layout: str
    form: str
    stride: int = 0  # bytes of a record, 0 for the shape's own
    unit: int = 4  # bytes of a load's element
    tiled: bool = False
    ref: bool = False
    plain: bool = False  # gather with tl.load

    def __str__(self):
        name = f"{self.layout}{'+ref' * self.ref}{' tl.load' * self.plain}"
        store = f"{self.stride or SHAPES[self.shape][2]} {'words' if self.unit == 4 else 'bytes'}"
        return f"{self.shape:9} | {name:8} | {store}{', tiles of 64' * self.tiled} | {self.form}"


def cases():
    found = [Case(shape, layout, form) for shape in SHAPES for layout in LAYOUTS for form in TILINGS]
    for form in TILINGS:
        stores = [(398, 1, False), (400, 1, False), (404, 4, False), (400, 1, True), (400, 4, True)]
        found += [Case("llama-400", "B", form, *store) for store in stores]
        found += [Case("llama-400", "D", form, *store) for store in stores[::4]]
        found += [Case("llama-400", "E", form, *store) for store in stores[2::2]]
        found.append(Case("llama-256", "B", form, ref=True))
        found += [Case("llama-256", layout, form, plain=True) for layout in ("A", "D", "D2", "E2")]
    return found


def constants(case, tokens, columns):
    """The kernel's compile-time arguments, less those of the tiling."""
    bk, width, stride, _ = SHAPES[case.shape]
    segs, _, r, _ = segments(case.shape, case.layout, case.unit)
    return dict(
        SEGS=segs,
        LAYOUT=case.layout,
        DOT=case.form == "dot",
        REF=case.ref,
        T=tokens,
        R=r,
        BK=bk,
        BN=columns,
        WIDTH=-(-width // columns) * columns if case.form == "dot" else 1,
        UNIT=case.unit,
        STRIDE=(case.stride or stride) // case.unit,
        TILED=case.tiled,
        ASM=not (case.plain or INTERPRET),
    )


def arguments(case, tokens, columns, device):
    """The kernel's tensors, and [tokens, columns of the output] in float64 of what it must return for some tokens."""
    bk, width, stride, _ = SHAPES[case.shape]
    stride = case.stride or stride
    segs, payload, r, entries = segments(case.shape, case.layout)
    meta = constants(case, tokens, columns)
    torch.manual_seed(0)
    records = torch.randint(0, 256, (tokens, stride), dtype=torch.uint8, device=device)
    gain = (0.5 + torch.rand(tokens, device=device)).half()
    records[:, -2:] = gain[:, None].view(torch.uint8)
    scale = torch.logspace(0, -1, r, device=device)[:, None] / (148 if case.layout == "E" else 1)
    up = (torch.randn(r, meta["WIDTH"], device=device) * scale).half()
    tab = torch.randn(entries, device=device).half()
    latents = torch.randn(REFERENCES if case.ref else tokens, r, device=device).half()
    refs = torch.randint(0, REFERENCES, (tokens,), dtype=torch.int32, device=device)
    out = torch.full((meta["WIDTH"] // min(columns, meta["WIDTH"]), tokens), float("nan"), device=device)

    some = torch.randperm(tokens, device=device)[:2048]
    if case.layout == "F":
        z = latents[some].double()
    else:
        z = reference(case.layout, segs, bk, records[some, :payload], tab.double())
    z = z * gain[some, None].double()
    if case.ref:
        z = z + latents[refs[some].long()].double()
    want = z @ up.double().reshape(r, len(out), -1).sum(2)

    codes = records if case.unit == 1 else records.view(torch.int32)
    if case.tiled:
        codes = codes.reshape(tokens // 64, 64, -1).transpose(1, 2).contiguous()
    return (codes, tab, latents, up, refs, out), some, want


# ---- running ---------------------------------------------------------------------------------------------------------
def compile_one(job):
    """Into Triton's cache on disk, under the key that a launch with real tensors looks for."""
    case, (bt, warps, stages), tokens, arch = job
    if arch:

        class Driver:  # enough of a driver to compile without a GPU
            get_current_device = staticmethod(lambda: 0)
            get_current_stream = staticmethod(lambda device: 0)
            get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))

        triton.runtime.driver.set_active(Driver())
    began = time.time()
    columns = 64 if arch and arch < 80 else 256  # ptxas takes minutes over 256 without wgmma
    types = (torch.int32 if case.unit == 4 else torch.uint8, *[torch.float16] * 3, torch.int32, torch.float32)
    try:
        kernel = spike.warmup(
            *types, **constants(case, tokens, columns), BT=bt, num_warps=warps, num_stages=stages, grid=(1,)
        )
    except Exception as error:  # one kernel that does not compile must not take the others with it
        return job, None, time.time() - began, f"{type(error).__name__}: {error}"
    return job, kernel.metadata.shared, time.time() - began, kernel.asm if arch else None


def compile_all(jobs, workers):
    """Compile in processes, forked before this one touches CUDA."""
    with futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        yield from pool.map(compile_one, jobs)


def interpret(only):
    worst = 0.0
    for case in cases():
        if only and only not in str(case):
            continue
        args, some, want = arguments(case, 128, 32, "cpu")
        spike[(2, len(args[-1]))](*args, **constants(case, 128, 32), BT=64)
        error = ((args[-1][:, some].T.double() - want).norm() / want.norm()).item()
        worst = max(worst, error) if error == error else float("inf")
        print(f"{case}: {error:.1e}", flush=True)
    print(f"worst {worst:.1e}")
    return worst > 5e-3


def measure(run, flush, times=20):
    """Median milliseconds between CUDA events, with a cold L2 before each."""
    run()
    spans = []
    for _ in range(times):
        flush.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        run()
        events[1].record()
        spans.append(events)
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in spans)


def bench(options):
    began = time.time()
    chosen = [case for case in cases() if not options.only or options.only in str(case)]
    jobs = [(case, tiling, options.tokens, None) for case in chosen for tiling in TILINGS[case.form]]
    broken = {}
    try:
        for job, shared, _, note in compile_all(jobs, options.jobs):
            if shared is None:
                broken[job[:2]] = note
    except Exception as error:  # launches compile for themselves
        print(f"compiling ahead failed: {error!r}", flush=True)
    print(f"compiled {len(jobs) - len(broken)} of {len(jobs)} in {time.time() - began:.0f} s", flush=True)

    tokens, flush = options.tokens, torch.empty(512 << 20, dtype=torch.int8, device="cuda")
    empty = measure(lambda: None, flush)
    copies, rows = {}, []
    for width in {SHAPES[case.shape][1] for case in chosen}:
        dense = torch.randn(2, tokens, width, device="cuda").half()
        copies[width] = measure(lambda dense=dense: dense[0].copy_(dense[1]), flush)
    print(f"two events with nothing between {1e3 * empty:.1f} us; copies of dense tokens, by width, us:", end=" ")
    print({width: round(1e3 * span, 1) for width, span in copies.items()}, flush=True)
    for case in chosen:
        if time.time() - began > options.budget:
            print(f"out of time before {case}", flush=True)
            break
        args, some, want = arguments(case, tokens, 256, "cuda")
        out, meta = args[-1], constants(case, tokens, 256)
        _, width, stride, _ = SHAPES[case.shape]
        size = 2 * meta["R"] if case.layout == "F" else case.stride or stride
        for bt, warps, stages in TILINGS[case.form]:
            row = dict(case._asdict(), tokens_a_tile=bt, warps=warps, stages=stages, bytes=size, components=meta["R"])
            rows.append(row)
            try:
                if (case, (bt, warps, stages)) in broken:
                    raise RuntimeError(broken[case, (bt, warps, stages)])

                def run(columns=1, bt=bt, warps=warps, stages=stages, args=args, meta=meta):
                    return spike[(tokens // bt, columns)](*args, **meta, BT=bt, num_warps=warps, num_stages=stages)

                out.fill_(float("nan"))
                kernel = run(len(out))
                row["error"] = ((out[:, some].T.double() - want).norm() / want.norm()).item()
                row["ms"], row["ms_all_columns"] = measure(run, flush), measure(lambda: run(len(out)), flush)  # noqa: B023
            except Exception as error:  # out of shared memory, say
                row["failed"] = f"{type(error).__name__}: {error}"[:300]
                print(f"{case}, {bt}x{warps}x{stages}: {row['failed']}", flush=True)
                continue
            row.update(registers=kernel.n_regs, spills=kernel.n_spills, shared=kernel.metadata.shared)
            row["gb_s"] = tokens * size / row["ms"] / 1e6
            row["tokens_s"] = tokens / row["ms"] * 1e3
            row["times_copy"] = row["ms"] / copies[width]
    head = "shape | layout | record | form | tile | us | GB/s | Mtok/s | / copy | us all columns | regs | spills | smem"
    print(f"| {head} | error |\n{'| --- ' * 14}|")
    for case in chosen:
        mine = [row for row in rows if Case(*[row[k] for k in Case._fields]) == case and "failed" not in row]
        if mine:
            r = min(mine, key=lambda row: row["ms_all_columns"])
            r["best"] = True
            print(
                f"| {case} | {r['tokens_a_tile']}x{r['warps']}x{r['stages']} | {1e3 * r['ms']:.1f} | {r['gb_s']:.0f} | "
                f"{r['tokens_s'] / 1e6:.0f} | {r['times_copy']:.2f} | {1e3 * r['ms_all_columns']:.1f} | "
                f"{r['registers']} | {r['spills']} | {r['shared']} | {r['error']:.1e} |"
            )
    if options.out:
        about = dict(device=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__)
        about.update(tokens=tokens, empty_ms=empty, copy_ms=copies, seconds=time.time() - began, rows=rows)
        with open(options.out, "w") as file:
            json.dump(about, file, indent=1)
    print(f"{time.time() - began:.0f} s")
    return any("failed" in row or not row.get("error", 0) < 5e-3 for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", help="JSON with every tiling measured")
    parser.add_argument("--only", help="cases whose printed name holds this, such as '| B '")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--budget", type=float, default=210, help="seconds after which no new case begins")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="compiling processes")
    parser.add_argument("--interpret", action="store_true", help="check kernels in Triton's interpreter")
    parser.add_argument("--compile", type=int, metavar="SM", help="only compile, for 90 or 75")
    options = parser.parse_args()
    if options.interpret:
        sys.exit(interpret(options.only))
    if options.compile:
        chosen = [case for case in cases() if not options.only or options.only in str(case)]
        work = [(case, tiling, options.tokens, options.compile) for case in chosen for tiling in TILINGS[case.form]]
        failed = 0
        for (case, tiling, _, _), shared, seconds, note in compile_all(work, options.jobs):
            failed += shared is None
            print(f"{case} {tiling}: {note if shared is None else shared} ({seconds:.1f} s)", flush=True)
        sys.exit(f"{failed} failed" if failed else 0)
    sys.exit(bench(options))
