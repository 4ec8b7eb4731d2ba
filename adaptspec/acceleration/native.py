"""Our C kernel, compiled once with the system's compiler, if there is one."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from adaptspec.cache_folder import cache_root

KERNEL_SOURCE = Path(__file__).with_name("kernels.c")
SWITCH = "ADAPTSPEC_NATIVE"
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-fPIC")
COMPILER_SECONDS = 120
TILE_ROWS, TILE_DEPTH, MOST_KEPT = 16, 32, 64  # as in kernels.c

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


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


class Kernel:
    """The compiled functions.

    ``tiles`` says whether products of bfloat16 run on matrix units (AMX).
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
        self._widen = library.widen_rows
        self._widen.argtypes = [_POINTER, _POINTER, _LONG, _LONG, _LONG]
        self._widen.restype = None
        self._largest = {
            torch.bfloat16: library.largest_16,
            torch.float16: library.largest_16,
            torch.float32: library.largest_32,
        }
        for function in self._largest.values():
            function.argtypes = [_POINTER, *[_LONG] * 4, _POINTER, _INT]
            function.restype = None

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """``x [rows, in]`` times ``weight [out, in]`` transposed, plus ``bias [out]``.

        All contiguous, of one type, bfloat16 or float32, on the CPU. A row's result
        doesn't depend on how many rows there are.
        """
        rows, inner = x.shape
        outer = weight.shape[0]
        y = torch.empty((rows, outer), dtype=x.dtype)
        # Held until the call is over: the kernel reads them by their addresses.
        if self.tiles and x.dtype is torch.bfloat16:
            function, room = self._on_tiles, self._room_for_pairs(rows, inner)
            first, second = x.data_ptr(), room.data_ptr()
        else:
            function, wide = self._linear[x.dtype], self._widened(x)
            first, second = wide.data_ptr(), wide.shape[1]
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
        places = torch.empty((rows, count), dtype=torch.int64)
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
        return torch.empty(filled * depth, dtype=torch.bfloat16)

    def _widened(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` in float32, its rows filled up to whole registers."""
        rows, inner = x.shape
        # Weights of bfloat16 come two to a register's lane.
        step = self.lanes * (2 if x.dtype is torch.bfloat16 else 1)
        stride = -(-inner // step) * step
        if x.dtype is torch.bfloat16:
            wide = torch.empty((rows, stride), dtype=torch.float32)
            self._widen(x.data_ptr(), wide.data_ptr(), rows, inner, stride)
        elif stride != inner:
            wide = torch.zeros((rows, stride), dtype=torch.float32)
            wide[:, :inner] = x
        else:
            wide = x
        return wide


@functools.cache
def kernel() -> Kernel:
    """The kernel, compiled at first use and kept in the user's cache folder.

    Raises:
        NativeUnavailableError: without a compiler, where it fails, or where the cache
            folder can't be written.
    """
    if os.environ.get(SWITCH) == "0":
        raise NativeUnavailableError(f"switched off by {SWITCH}=0")
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NativeUnavailableError("no C compiler found")
    name = f"kernels-{_fingerprint(compiler)}"
    try:
        folder = cache_root() / "native"
        path = _intact(folder, name) or _compile(compiler, folder, name)
        return Kernel(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        raise NativeUnavailableError(
            f"the compiled kernel can't be used: {error}"
        ) from None


def largest(x: torch.Tensor, count: int) -> torch.Tensor | None:
    """:meth:`Kernel.largest`, or None where ``x`` or this process isn't ready for it.

    The kernel comes with a model; nothing is compiled for this.
    """
    if not kernel.cache_info().currsize:
        return None
    compiled = kernel()
    return compiled.largest(x, count) if compiled.ranks(x, count) else None


def _intact(folder: Path, name: str) -> Path | None:
    """The compiled library of that name, if its bytes are those that were written.

    Its file name ends with their digest: calling into a library that was cut short
    kills the process. A damaged one is removed.
    """
    for path in sorted(folder.glob(f"{name}-*.so")):
        if path.stem == f"{name}-{_digest(path)}":
            return path
        path.unlink()
    return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _fingerprint(compiler: str) -> str:
    """Of everything the machine code depends on."""
    digest = hashlib.sha256(KERNEL_SOURCE.read_bytes())
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=False
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
        compiled, linked = Path(private) / "kernels.o", Path(private) / "kernels.so"
        # Linked without -fopenmp: the OpenMP symbols are then those of the library that
        # torch has loaded, so that no second pool of threads spins beside its own.
        for command in (
            [compiler, *FLAGS, "-c", str(KERNEL_SOURCE), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked)],
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
