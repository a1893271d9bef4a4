"""Installing: from the source distribution, without a compiler, without the core, with a core of another version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
import torch
from compiled import nvcc

import segadv
from benchmarks import instructions

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # The ninja of this environment, which need not be activated: there may be no make.
    inherited["CMAKE_GENERATOR"] = "Ninja"
    inherited["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def fresh_environment(path: Path) -> Path:
    """A virtual environment that sees this one's packages (torch, build tools) behind its own. Returns its python."""
    venv.create(path, with_pip=False)
    python = path / "bin" / "python"
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    Path(purelib, "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, what: Path, *options: str, **environment: str) -> None:
    result = run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", "--ignore-installed",
        "--no-build-isolation", *options, what, cwd=python.parent, **environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


REPORT = """
import _segadv_native, segadv
from segadv.ops import backends
print(segadv.__file__)
print(_segadv_native.__file__)
print(backends.default("cpu"))
"""


def test_the_core_needs_neither_torch_nor_a_library_of_cuda() -> None:
    output = run("readelf", "-d", sys.modules["_segadv_native"].__file__ or "").stdout
    libraries = re.findall(r"\(NEEDED\).*\[(.+)\]", output)
    assert libraries
    assert not [name for name in libraries if re.match("lib(torch|c10|cuda|cudart|nvrtc)", name)], libraries


def narrow_gradient_stores(extension: Path, arch: str) -> list[str]:
    """Stores of less than 16 bytes in the kernels that write a full-resolution gradient of float32 in vectors.

    The compiler has been seen to take vectors apart which it stored under a condition.
    """
    kernels = instructions.kernels_of(extension, arch)
    names = [kernels[f"gradient_kernel<Pixels<float, 4, false>, {margin}>"][0] for margin in ("true", "false")]
    codes = instructions.code_of(extension, arch, names).values()
    assert len(codes) == 2
    assert all("STG.E.EF.128" in code for code in codes)
    return [line for code in codes for line in code.splitlines() if re.search(r"STG\.E(\.EF)?\s", line)]


def loads_ahead(extension: Path, arch: str) -> dict[str, int]:
    """How many loads of 16 bytes stand before the first store in a loop, of kernels that read and write as they go.

    The compiler moves none ahead of a store that might change what it loads: then one is under way for each thread, and
    a GPU waits for memory instead of keeping it busy.
    """
    kernels = instructions.kernels_of(extension, arch)
    pixels = ("Pixels<float, 4, false>", "Pixels<BFloat16, 8, false>", "Pixels<Half, 8, false>")
    names = {"scale_gradient_kernel<float, 4>", "scale_gradient_kernel<BFloat16, 8>", "scale_gradient_kernel<Half, 8>"}
    names |= {f"gradient_kernel<{those}, false>" for those in pixels}
    names |= {f"cross_entropy_kernel<{those}, {loss}>" for those in pixels for loss in range(3)}
    code = instructions.code_of(extension, arch, [kernels[name][0] for name in names])
    found = {}
    for name in names:
        found[name] = 0
        for loop in instructions.loops_of(code[kernels[name][0]]):
            before, store, _ = "\n".join(loop.instructions).partition(
                "STG.E.EF.128" if "scale" not in name else "STG.E.128"
            )
            if store:
                found[name] = max(found[name], before.count("LDG.E.128"))
    return found


def test_what_the_compiler_made_of_cuda_kernels() -> None:
    """Registers suffice; where not, on other GPUs than sm_90, for 16 bytes that no innermost loop touches."""
    if not segadv.build_info()["cuda"]:
        pytest.skip("the installed core has no CUDA kernels: it was built without nvcc, or with SEGADV_CUDA=OFF")
    assert re.fullmatch(r"nvcc [\d.]+ for \d.*", segadv.build_info()["cuda"])
    extension = Path(sys.modules["_segadv_native"].__file__ or "")
    for arch in instructions.architectures_of(extension):
        kernels = instructions.kernels_of(extension, arch)
        assert len(kernels) > 50
        spilling = {name: symbol for name, (symbol, needs) in kernels.items() if needs["STACK"] != "0"}
        assert not spilling or arch != "sm_90", spilling
        assert all(int(kernels[name][1]["STACK"]) <= 16 for name in spilling), spilling
        for code in instructions.code_of(extension, arch, list(spilling.values())).values() if spilling else ():
            assert re.search(r"\b(LDL|STL)\b", code)
            innermost = [loop for loop in instructions.loops_of(code) if loop.is_innermost]
            assert innermost
            assert not [line for loop in innermost for line in loop.instructions if re.search(r"\b(LDL|STL)\b", line)]
        assert narrow_gradient_stores(extension, arch) == []
        ahead = loads_ahead(extension, arch)
        assert min(ahead.values()) >= 4, ahead


def test_instructions_of_a_loop_are_its_own() -> None:
    """A loop in a loop, a branch forward, a rare path behind the end, and the branch to itself that ends a kernel."""
    code = ["MOV R1, c[0x0][0x28]", "LDG.E R2, [R4.64]", "@P0 BRA 0x40", "IADD3 R2, R2, 0x1, RZ", "FADD R3, R3, R2",
            "@!P1 BRA `(.L_x_1) 0x30", "BRA.DIV UR4, 0xa0", "@P2 BRA 0x10", "@P3 EXIT", "EXIT", "VOTE.ALL P6, !P6",
            "BRA 0x70", "BRA 0xc0"]  # fmt: skip
    sass = "".join(f"        /*{16 * i:04x}*/    {line} ;   /* 0x00 */\n" for i, line in enumerate(code))
    assert [(len(own), innermost) for own, innermost in instructions.loops_of(sass)] == [(4, False), (3, True)]


def test_instructions_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    if not segadv.build_info()["cuda"]:
        with pytest.raises(SystemExit):
            instructions.main([])
        assert "the installed core has no CUDA kernels" in capsys.readouterr().err
        return
    known = instructions.architectures_of(Path(sys.modules["_segadv_native"].__file__ or ""))
    assert instructions.main(["margin_kernel<Pixels<float", "--arch", known[0]]) == 0
    table = capsys.readouterr().out
    (row,) = re.findall(r"\| margin_kernel<Pixels<float, 8, true>> \| (\d+) \| \d+ \| 0 \| ([\d ]+) \|\n", table)
    assert 32 <= int(row[0]) <= 255
    assert all(count > 3 for count in map(int, row[1].split()))
    assert "double" not in table
    with pytest.raises(SystemExit):
        instructions.main(["--arch", "sm_1"])
    assert f"--arch: sm_1 came; the installed core was compiled for {', '.join(known)}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        instructions.main(["marginal", "--arch", known[0]])
    assert "KERNEL: marginal came, and is part of no name: " in capsys.readouterr().err


def test_source_distribution_installs_and_native_runs_from_the_clone(tmp_path: Path) -> None:
    result = run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (sdist,) = tmp_path.glob("segadv-*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert packed >= {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.is_file()}
    python = fresh_environment(tmp_path / "environment")
    # Without optimisation and CUDA it takes a sixth of the time; others look at the installed core, which has both.
    install(python, sdist, "-C", "cmake.build-type=Debug", SEGADV_CUDA="OFF")
    # In the clone the uncompiled folder hides the installed package, but never the extension.
    package, extension, backend = run(python, "-c", REPORT).stdout.split()
    assert Path(package).parent.parent == ROOT
    assert tmp_path / "environment" in Path(extension).parents
    assert backend == "native"
    package, extension, backend = run(python, "-c", REPORT, cwd=tmp_path).stdout.split()
    assert tmp_path / "environment" in Path(package).parents
    assert (Path(package).parent / "py.typed").exists()
    assert backend == "native"
    info = run(python, "-c", "import segadv; print(segadv.build_info()['cuda'])", cwd=tmp_path).stdout
    assert info == "None\n"


@pytest.mark.parametrize(
    ("setting", "nvcc", "message"),
    [
        ("ON", "/no/such/nvcc", "SEGADV_CUDA=ON, but no working nvcc was found"),
        ("AUTO", "/no/such/nvcc", "no working nvcc was found: no CUDA kernels"),
        ("maybe", "/no/such/nvcc", "SEGADV_CUDA is AUTO, ON or OFF, not MAYBE"),
    ],
)
def test_missing_nvcc_is_named(tmp_path: Path, setting: str, nvcc: str, message: str) -> None:
    result = configure(tmp_path, SEGADV_CUDA=setting, CUDACXX=nvcc)
    assert (result.returncode == 0) == (setting == "AUTO")
    assert message in " ".join((result.stdout + result.stderr).split())


@pytest.mark.parametrize(
    ("environment", "architectures"),
    [
        ({}, r"75-real;80-real;90-real(;\d+-real)*;\d+-virtual"),
        ({"CUDAARCHS": "80-real;90"}, "80-real;90"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 8.6;9.0a 9.0+PTX"}, "80-real;86-real;90a-real;90"),
        ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, None),
    ],
    ids=str,
)
def test_architectures(tmp_path: Path, environment: dict[str, str], architectures: str | None) -> None:
    if not nvcc() or torch.cuda.is_available():
        pytest.skip("architectures are chosen where there is an nvcc; those of a visible GPU come before all others")
    clean = {"CUDAARCHS": "", "TORCH_CUDA_ARCH_LIST": ""}
    result = configure(tmp_path, SEGADV_CUDA="ON", **(clean | environment))
    if architectures is None:
        assert "TORCH_CUDA_ARCH_LIST: Hopper is not of the form 9.0 or 9.0+PTX" in " ".join(result.stderr.split())
    else:
        assert result.returncode == 0, result.stdout + result.stderr
        assert re.search(f"segadv: CUDA kernels for {architectures}\n", result.stdout)


@pytest.mark.parametrize(("package", "message"), [("Python", "python3-dev"), ("OpenMP", "clang needs libomp-dev")])
def test_what_the_build_needs_is_named(tmp_path: Path, package: str, message: str) -> None:
    result = configure(tmp_path, f"-DCMAKE_DISABLE_FIND_PACKAGE_{package}=ON", SEGADV_CUDA="OFF")
    assert result.returncode != 0
    words = " ".join(result.stderr.split())
    assert message in words
    assert "SEGADV_NATIVE=OFF pip install" in words


def configure(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    cmake = pytest.importorskip("cmake", reason="the cmake package is not installed")
    pybind11 = pytest.importorskip("pybind11", reason="the pybind11 package is not installed")
    return run(
        Path(cmake.CMAKE_BIN_DIR) / "cmake", ROOT, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}", *options, cwd=folder, **environment,
    )  # fmt: skip


def test_pure_python_install_falls_back_and_says_so(tmp_path: Path) -> None:
    python = fresh_environment(tmp_path / "environment")
    install(python, ROOT, SEGADV_NATIVE="OFF")
    code = (
        "import sys; sys.modules['_segadv_native'] = None\n"  # hides the one of the outer environment
        "import torch, warnings, segadv, segadv.functional as F\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always'); F.l1_norm(torch.ones(1, 2)); F.l1_norm(torch.ones(1, 2))\n"
        "print(len(caught), segadv.build_info()['native'], segadv.__file__)\n"
        "try:\n"
        "    with segadv.backend('native'): F.l1_norm(torch.ones(1, 2))\n"
        "except RuntimeError as error: print(error)\n"
    )
    result = run(python, "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first.startswith(f"1 False {tmp_path}")
    assert "backend 'native' was requested for cpu tensors but cannot run" in second


THREADS = """
import os, sys, threading, time, torch, segadv.functional as F

logits, labels = torch.randn(8, 19, 64, 64), torch.randint(0, 19, (8, 64, 64))

def started():
    time.sleep(0.2)  # threads that have ended are gone
    before = len(os.listdir("/proc/self/task"))
    F.averaged_gain(logits, labels)
    return len(os.listdir("/proc/self/task")) - before

def in_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(started()))
    thread.start()
    thread.join()
    return found[0]

torch.set_num_threads(1)
print(started(), in_a_new_thread(), end=" ")
torch.set_num_threads(3)
core = sys.modules["_segadv_native"]
print(in_a_new_thread(), core.compiler.split()[0], *core.instruction_sets())
"""


def test_the_kernels_run_on_as_many_threads_as_torch() -> None:
    """In a thread where torch has not run anything yet, too."""
    places = (ROOT, Path(sys.modules["_segadv_native"].__file__ or "").parent)
    result = run(sys.executable, "-c", THREADS, OMP_NUM_THREADS="4", PYTHONPATH=os.pathsep.join(map(str, places)))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[:3] == ["0", "0", "2"]


@pytest.mark.parametrize(("compiler", "name"), [("clang++", "Clang"), ("g++-11", "GNU")])
def test_other_compilers(tmp_path: Path, compiler: str, name: str) -> None:
    """clang, whose OpenMP is not torch's, and the g++ of Ubuntu 22.04."""
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed here; nothing else needs it")
    if "the C++ compiler has no OpenMP" in configure(tmp_path, CXX=compiler, SEGADV_CUDA="OFF").stderr:
        pytest.skip(f"{compiler} has no OpenMP here (clang's is in libomp-dev), which the core cannot do without")
    python = fresh_environment(tmp_path / "environment")
    options = ("-C", "cmake.build-type=Debug", "-C", f"build-dir={tmp_path / 'build'}")  # the clone's has its compiler
    install(python, ROOT, *options, SEGADV_CUDA="OFF", CXX=compiler)
    result = run(python, "-c", THREADS, OMP_NUM_THREADS="4", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0", "0", "2", name, *sys.modules["_segadv_native"].instruction_sets()]


def test_core_and_package_tell_the_same_version() -> None:
    """CMakeLists.txt and pyproject.toml."""
    assert segadv.build_info()["native_version"] == segadv.__version__


@pytest.mark.parametrize("number", [0, 99])
def test_core_of_another_version_is_refused(tmp_path: Path, number: int) -> None:
    (tmp_path / "_segadv_native.py").write_text(f"interface_version = {number}\n")
    result = run(sys.executable, "-c", "import segadv", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert result.returncode != 0
    assert f"has interface {number}, this package" in result.stderr
    assert "install segadv again" in result.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("ImportError('undefined symbol')", "the extension _segadv_native does not load: undefined symbol\n"),
        ("ModuleNotFoundError('')", "the extension _segadv_native is not installed; installing segadv builds it where"),
    ],
)
def test_why_there_is_no_core(tmp_path: Path, error: str, message: str) -> None:
    (tmp_path / "_segadv_native.py").write_text(f"raise {error}\n")
    code = "import segadv; info = segadv.build_info(); print(info['native'], info['native_missing'])"
    result = run(sys.executable, "-c", code, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert result.stdout.startswith(f"False {message}"), result.stderr


def test_missing_compiler_is_named(tmp_path: Path) -> None:
    cmake = pytest.importorskip("cmake", reason="the cmake package is not installed")
    result = run(Path(cmake.CMAKE_BIN_DIR) / "cmake", ROOT, cwd=tmp_path, CXX="/no/such/compiler")
    assert result.returncode != 0
    assert "no working C++ compiler was found" in result.stderr
    assert "SEGADV_NATIVE=OFF pip install" in " ".join(result.stderr.split())
