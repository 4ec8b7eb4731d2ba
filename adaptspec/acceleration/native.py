"""Our C kernels, compiled once with the system's compiler, if there is one."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from adaptspec.cache_folder import cache_root

KERNEL_FOLDER = Path(__file__).with_name("kernels")
SOURCES = tuple(sorted(KERNEL_FOLDER.glob("*.c")))
HEADERS = tuple(sorted(KERNEL_FOLDER.glob("*.h")))
SWITCH = "ADAPTSPEC_NATIVE"
COMPILERS = ("cc", "gcc", "clang")
FLAGS: tuple[str, ...] = (
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fopenmp",
    "-fPIC",
)
COMPILER_SECONDS = 120
TILE_ROWS, TILE_DEPTH, MOST_KEPT = 16, 32, 64  # as in the kernels

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


# Of weights that the kernels multiply by.
LINEAR_TYPES = (torch.bfloat16, torch.float32)


class NativeUnavailableError(Exception):
    """Why there is no native kernel here."""


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether ``data_ptr`` is where the CPU finds the elements, one after another.

    A subclass (quantised, distributed, fake) has other contents or none, and a tensor
    whose storage was released has no address.
    """
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_conj()
        and not tensor.is_neg()
        and (tensor.data_ptr() != 0 or not tensor.numel())
    )


@dataclass(frozen=True)
class Seen:
    """Which keys each row attends to.

    Args:
        keys: ``[rows, keys]`` of int32: their numbers in order, then nothing of use.
        counts: ``[rows]`` of int32: how many.
    """

    keys: torch.Tensor
    counts: torch.Tensor


class Kernel:
    """The compiled functions.

    Args:
        library: What the sources were compiled to.

    Attributes:
        tiles: Whether products of bfloat16 run on matrix units (AMX).
        pairs: Whether packed products of bfloat16 use instructions for pairs of them
            (AVX-512-BF16); otherwise they are widened in registers.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.lanes = int(library.lanes())
        self._linear = {
            torch.bfloat16: library.linear_bf16,
            torch.float32: library.linear_f32,
        }
        self._on_tiles = library.linear_tiles
        for second, functions in (
            (_LONG, self._linear.values()),
            (_POINTER, [self._on_tiles]),
        ):
            for function in functions:
                function.argtypes = [
                    *(_POINTER, second, _POINTER, _POINTER, _POINTER),
                    *(_LONG, _LONG, _LONG, _INT),
                ]
                function.restype = None
        self.tiles = bool(library.tiles())
        self._packed = {
            torch.bfloat16: library.packed_bf16,
            torch.float32: library.packed_f32,
        }
        for function in self._packed.values():
            function.argtypes = [*[_POINTER] * 4, _LONG, _LONG, _LONG, _INT]
            function.restype = None
        self._pack = {
            torch.bfloat16: (library.pack_bf16, library.unpack_bf16),
            torch.float32: (library.pack_f32, library.unpack_f32),
        }
        for pack, unpack in self._pack.values():
            pack.argtypes = [_POINTER, _POINTER, _LONG, _LONG, _INT]
            unpack.argtypes = [*[_POINTER] * 3, _LONG, _LONG, _INT]
            pack.restype = unpack.restype = None
        self.columns = int(library.packed_columns())
        self.pairs = bool(library.packed_pairs())
        self._large_pages = library.large_pages
        self._large_pages.argtypes = [_POINTER, _LONG]
        self._large_pages.restype = None
        self._seen = {
            torch.bfloat16: library.seen_bf16,
            torch.float32: library.seen_f32,
            torch.bool: library.seen_bool,
        }
        for function in self._seen.values():
            function.argtypes = [_POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER]
            function.restype = _INT
        self._attend = {
            torch.bfloat16: library.attend_bf16,
            torch.float32: library.attend_f32,
        }
        for function in self._attend.values():
            function.argtypes = [
                *(_POINTER, _LONG, _POINTER, _LONG, _LONG, _POINTER, _LONG, _LONG),
                *(_POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG, _LONG),
                *(_LONG, ctypes.c_float, _INT),
            ]
            function.restype = None
        self._widen = library.widen_rows
        self._widen.argtypes = [_POINTER, _POINTER, _LONG, _LONG, _LONG]
        self._widen.restype = None
        # A decoder layer, the bytes of room that a call for so many rows needs, and
        # the queries that it leaves there.
        self.layers = {
            torch.bfloat16: (
                *(library.layer_bf16, library.layer_room_bf16),
                library.layer_queries_bf16,
            ),
            torch.float32: (
                *(library.layer_f32, library.layer_room_f32),
                library.layer_queries_f32,
            ),
        }
        for run, room, queries in self.layers.values():
            run.argtypes, run.restype = [_POINTER, _POINTER], None
            room.argtypes, room.restype = [_POINTER, _LONG], _LONG
            queries.argtypes = [_POINTER, _LONG, _POINTER, _POINTER]
            queries.restype = None
        self._largest = {
            torch.bfloat16: library.largest_16,
            torch.float16: library.largest_16,
            torch.float32: library.largest_32,
        }
        for function in self._largest.values():
            function.argtypes = [_POINTER, *[_LONG] * 4, _POINTER, _INT]
            function.restype = None

    def __reduce__(self) -> tuple[Callable[[], Kernel], tuple[()]]:
        """A copy is the process's own kernel."""
        return kernel, ()

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """``x [rows, in]`` times ``weight [out, in]`` transposed, plus ``bias [out]``.

        All contiguous, of one type, bfloat16 or float32, on the CPU. A row's result
        doesn't depend on how many rows there are.
        """
        rows, inner = x.shape
        outer = weight.shape[0]
        y = torch.empty((rows, outer), dtype=x.dtype, device="cpu")
        # Held until the call is over: the kernel reads them by their addresses.
        if self.tiles and x.dtype is torch.bfloat16:
            function, room = self._on_tiles, self._room_for_pairs(rows, inner)
            first, second = x.data_ptr(), room.data_ptr()
        else:
            function, read = self._linear[x.dtype], self._read(x)
            first, second = read.data_ptr(), read.shape[1]
        function(
            first,
            second,
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            rows,
            outer,
            inner,
            torch.get_num_threads(),
        )
        return y

    def packed_size(self, weight: torch.Tensor) -> int:
        """How many elements ``weight [out, in]`` has when it is packed."""
        outer, inner = weight.shape
        per = 4 // weight.dtype.itemsize
        whole = -(-outer // self.columns) * self.columns
        return whole * -(-inner // per) * per

    def pack(self, weight: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        """``weight [out, in]`` in the layout of :meth:`packed_linear`.

        Args:
            room: Written to and returned, :meth:`packed_size` elements of its type.
        """
        plain = weight.contiguous()
        pack, _ = self._pack[plain.dtype]
        pack(plain.data_ptr(), room.data_ptr(), *plain.shape, torch.get_num_threads())
        return room

    def unpack(
        self,
        packed: torch.Tensor,
        shape: Sequence[int],
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weight of ``shape`` that was packed, or some ``rows`` of it.

        Raises:
            IndexError: if a row is none of its rows.
        """
        places: torch.Tensor | None = None
        if rows is not None:
            places = rows.to(torch.int64).contiguous()
            if len(places):
                least, most = places.aminmax()
                if int(least) < 0 or int(most) >= shape[0]:
                    raise IndexError(f"rows {int(least)} to {int(most)} of {shape[0]}")
        count = shape[0] if places is None else len(places)
        plain = torch.empty((count, shape[1]), dtype=packed.dtype, device="cpu")
        _, unpack = self._pack[packed.dtype]
        unpack(
            packed.data_ptr(),
            None if places is None else places.data_ptr(),
            plain.data_ptr(),
            count,
            shape[1],
            torch.get_num_threads(),
        )
        return plain

    def packed_linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        outer: int,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """``x [rows, in]`` times a packed weight ``[outer, in]``, plus ``bias``.

        All contiguous, of one type, on the CPU. A row's bits depend on that row alone.
        """
        rows, inner = x.shape
        per = 4 // x.dtype.itemsize
        words = -(-inner // per)
        y = torch.empty((rows, outer), dtype=x.dtype, device="cpu")
        # Held until the call is over: the kernel reads it by its address.
        read = x if words * per == inner else functional.pad(x, (0, 1))
        if x.dtype is torch.bfloat16 and not self.pairs:
            read = read.float()
        self._packed[x.dtype](
            read.data_ptr(),
            packed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            rows,
            outer,
            words,
            torch.get_num_threads(),
        )
        return y

    def step(self, dtype: torch.dtype, plain: bool) -> int:
        """What sums of a layer run over: whole words, or registers of plain weights."""
        word = 4 // dtype.itemsize
        return word * self.lanes if plain else word

    def seen(self, mask: torch.Tensor) -> Seen | None:
        """What each row of ``mask [rows, keys]`` lets it see.

        None for masks that weigh keys, and where a row sees none.
        """
        rows, length = mask.shape
        function = self._seen.get(mask.dtype)
        if function is None or not is_plain(mask) or mask.stride(1) != 1:
            return None
        keys = torch.empty((rows, length), dtype=torch.int32, device="cpu")
        counts = torch.empty(rows, dtype=torch.int32, device="cpu")
        told = function(
            mask.data_ptr(),
            mask.stride(0),
            rows,
            length,
            keys.data_ptr(),
            counts.data_ptr(),
        )
        return Seen(keys, counts) if told else None

    def attends(self, *tensors: torch.Tensor) -> bool:
        """Whether :meth:`attend` takes these as query, key and value."""
        return all(
            x.dtype in self._attend
            and x.dtype is tensors[0].dtype
            and is_plain(x)
            and x.stride(-1) == 1
            and not (torch.is_grad_enabled() and x.requires_grad)
            for x in tensors
        )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        seen: Seen | None,
        scale: float,
    ) -> torch.Tensor:
        """Attention of few rows; the bits of each depend on that row and what it sees.

        Args:
            query: ``[heads, rows, d]``.
            key: ``[groups, keys, d]``; each is shared by ``heads / groups`` heads.
            value: ``[groups, keys, v]``.
            seen: Which keys each row sees; None: all.
            scale: Of the products before the softmax.

        Returns:
            ``[rows, heads, v]``.
        """
        heads, rows, size = query.shape
        groups, length, width = value.shape
        flat = query.transpose(0, 1).reshape(rows * heads, size)
        read = self._read(flat.contiguous())
        out = torch.empty((rows, heads, width), dtype=query.dtype, device="cpu")
        self._attend[query.dtype](
            read.data_ptr(),
            read.shape[1],
            key.data_ptr(),
            key.stride(0),
            key.stride(1),
            value.data_ptr(),
            value.stride(0),
            value.stride(1),
            out.data_ptr(),
            None if seen is None else seen.keys.data_ptr(),
            None if seen is None else seen.counts.data_ptr(),
            length,
            rows,
            heads,
            heads // groups,
            size,
            width,
            scale,
            torch.get_num_threads(),
        )
        return out

    def large_pages(self, room: torch.Tensor) -> None:
        """Wish that ``room``, aligned to a large page, lies in large pages."""
        self._large_pages(room.data_ptr(), room.nbytes)

    def ranks(self, x: torch.Tensor, count: int) -> bool:
        """Whether :meth:`largest` takes these."""
        return (
            x.dtype in self._largest
            and is_plain(x)
            and x.dim() == 2
            and x.stride(1) == 1
            and 1 <= count <= min(MOST_KEPT, x.shape[1])
        )

    def largest(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """Where the largest of each row of ``x [rows, n]`` stand, ``[rows, count]``.

        Largest first, of equals the first first. Only what :meth:`ranks` allows.
        """
        rows, columns = x.shape
        places = torch.empty((rows, count), dtype=torch.int64, device="cpu")
        self._largest[x.dtype](
            x.data_ptr(),
            rows,
            columns,
            x.stride(0),
            count,
            places.data_ptr(),
            torch.get_num_threads(),
        )
        return places

    def _room_for_pairs(self, rows: int, inner: int) -> torch.Tensor:
        """Where ``linear_tiles`` puts x, filled up to whole tiles."""
        side = min(rows, TILE_ROWS)
        filled = -(-rows // side) * side
        depth = -(-inner // TILE_DEPTH) * TILE_DEPTH
        return torch.empty(filled * depth, dtype=torch.bfloat16, device="cpu")

    def _read(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` as the products read it: widened where they don't multiply pairs of
        bfloat16, its rows filled up to whole registers."""
        rows, inner = x.shape
        halves = x.dtype is torch.bfloat16
        # Weights of bfloat16 come two to a register's lane.
        step = self.lanes * (2 if halves else 1)
        stride = -(-inner // step) * step
        if halves and not self.pairs:
            wide = torch.empty((rows, stride), dtype=torch.float32, device="cpu")
            self._widen(x.data_ptr(), wide.data_ptr(), rows, inner, stride)
            return wide
        return x if stride == inner else functional.pad(x, (0, stride - inner))


def kernel() -> Kernel:
    """The kernel, compiled at first use and kept in the user's cache folder.

    Raises:
        NativeUnavailableError: without a compiler, where it fails, or where the cache
            folder can't be written. Nothing is tried twice in a process.
    """
    found = _found()
    if isinstance(found, NativeUnavailableError):
        raise found
    return found


@functools.cache
def _found() -> Kernel | NativeUnavailableError:
    try:
        return load_kernel()
    except NativeUnavailableError as error:
        return error


def load_kernel() -> Kernel:
    """What :func:`kernel` returns, loaded once more."""
    if os.environ.get(SWITCH) == "0":
        raise NativeUnavailableError(f"switched off by {SWITCH}=0")
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NativeUnavailableError("no C compiler found")
    try:
        name = f"kernels-{_fingerprint(compiler)}"
        folder = cache_root() / "native"
        path = _intact(folder, name) or _compile(compiler, folder, name)
        return Kernel(ctypes.CDLL(str(path)))
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(
            f"the compiled kernel can't be used: {error}"
        ) from None


def multiply_plain(
    compiled: Kernel,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    most_rows: int,
) -> torch.Tensor:
    """``x [..., in]`` times a plain ``weight [out, in]``, plus ``bias [out]``.

    By torch where the kernel can't read them, a gradient is wanted, or there are more
    than ``most_rows``. The caller may have moved, quantised or released a weight.
    """
    given = [x, weight] if bias is None else [x, weight, bias]
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if (
        not 0 < rows <= most_rows
        or x.dtype not in LINEAR_TYPES
        or any(each.dtype is not x.dtype or not is_plain(each) for each in given)
        or not all(each.is_contiguous() for each in given[1:])
        or weight.dim() != 2
        or x.shape[-1] != weight.shape[1]
        or (bias is not None and bias.shape != weight.shape[:1])
        or (torch.is_grad_enabled() and any(each.requires_grad for each in given))
    ):
        return functional.linear(x, weight, bias)
    y = compiled.linear(x.reshape(rows, x.shape[-1]).contiguous(), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def largest(x: torch.Tensor, count: int) -> torch.Tensor | None:
    """:meth:`Kernel.largest`, or None where ``x`` or this process isn't ready for it.

    The kernel comes with a model; nothing is compiled for this.
    """
    compiled = _found() if _found.cache_info().currsize else None
    if not isinstance(compiled, Kernel):
        return None
    return compiled.largest(x, count) if compiled.ranks(x, count) else None


def _intact(folder: Path, name: str) -> Path | None:
    """The compiled library of that name, if its bytes are those that were written.

    Its file name ends with their digest: calling into a library that was cut short
    kills the process. A damaged one is removed.
    """
    for path in sorted(folder.glob(f"{name}-*.so")):
        if path.stem == f"{name}-{_digest(path)}":
            return path
        path.unlink(missing_ok=True)
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _fingerprint(compiler: str) -> str:
    """Of everything the machine code depends on."""
    digest = hashlib.sha256()
    for file in (*SOURCES, *HEADERS):
        digest.update(file.read_bytes())
    version = subprocess.run(
        [compiler, "--version"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    parts = (
        *FLAGS,
        version.stdout,
        platform.machine(),
        _cpu_flags(),
        torch.__version__,
    )
    digest.update("\n".join(parts).encode())
    return digest.hexdigest()[:16]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x for x in lines if x.startswith(("flags", "Features"))), "")


def _compile(compiler: str, folder: Path, name: str) -> Path:
    """Compile to a private name and rename: processes may do this at once."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as private:
        linked = Path(private) / "kernels.so"
        objects = {source: Path(private) / f"{source.stem}.o" for source in SOURCES}
        # Linked without -fopenmp: the OpenMP symbols are then those of the library that
        # torch has loaded, so that no second pool of threads spins beside its own.
        for command in (
            *(
                [compiler, *FLAGS, "-c", str(source), "-o", str(compiled)]
                for source, compiled in objects.items()
            ),
            [
                compiler,
                "-shared",
                *map(str, objects.values()),
                "-o",
                str(linked),
                "-lm",
            ],
        ):
            try:
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    timeout=COMPILER_SECONDS,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise NativeUnavailableError(f"{compiler} failed: {error}") from None
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["no message"]
                raise NativeUnavailableError(f"{compiler} failed: {lines[0]}")
        path = folder / f"{name}-{_digest(linked)}.so"
        with linked.open("rb+") as file:  # written before its name says so
            os.fsync(file.fileno())
        linked.replace(path)
    return path
