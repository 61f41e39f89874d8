"""The product of one x with packed rows in C++: every width against fp64, and where it is not taken."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from random_rows import random_rows

from ryzen_llm.kernels import PackedRows, packed_linear
from ryzen_llm.kernels import packed_dot as module
from ryzen_llm.kernels.hardware import cpu_features
from ryzen_llm.kernels.packed_dot import packed_dot, suits

needs_avx2 = pytest.mark.skipif(not cpu_features().avx2, reason="this CPU has no AVX2")


def case(bits: int, groups: int, group: int, rows: int = 33) -> tuple[PackedRows, torch.Tensor, torch.Tensor]:
    """Packed rows, their values in fp64, and an x."""
    packed, values = random_rows(bits, rows, groups, group)
    return packed, values, torch.randn(groups * group, generator=torch.Generator().manual_seed(0))


@needs_avx2
@pytest.mark.parametrize(("groups", "group"), [(1, 64), (1, 576), (3, 192)])
@pytest.mark.parametrize("bits", range(1, 9))
def test_products_are_those_of_fp64(bits: int, groups: int, group: int) -> None:
    """Sums are fp32: off by a part of the sum of the terms' sizes."""
    rows, values, x = case(bits, groups, group)
    assert suits(group, bits)
    # The offset of the grid is taken off at the end, so what is summed is larger than the values.
    terms = x.double().abs() @ (values.abs() + 2**bits).T
    for dtype in (torch.float32, torch.bfloat16):
        given = x.to(dtype)
        got = packed_dot(given, *rows)
        assert got.dtype == torch.float32
        assert ((got.double() - given.double() @ values.T).abs() <= terms * 2**-20).all()


@needs_avx2
def test_scales_in_bf16_are_read_as_they_are() -> None:
    rows, _, x = case(3, 2, 64)
    scale = rows.scale.bfloat16()
    assert torch.equal(packed_dot(x, rows.codes, scale, 3), packed_dot(x, rows.codes, scale.float(), 3))


@needs_avx2
def test_no_rows_give_no_products() -> None:
    rows, _, x = case(4, 1, 64, rows=0)
    assert packed_dot(x, *rows).shape == (0,)


@needs_avx2
@pytest.mark.parametrize("dynamic", [False, True], ids=["static sizes", "symbolic sizes"])
def test_a_compiled_step_takes_it_as_one_graph(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's own loop must not be what is compared with itself."""
    rows, values, x = case(5, 1, 64)
    monkeypatch.setattr("ryzen_llm.kernels.packed_rows._dot", None)
    with torch.no_grad():
        got = torch.compile(packed_linear, fullgraph=True, dynamic=dynamic)(x[None], rows)
    torch.testing.assert_close(got[0].double(), x.double() @ values.T, atol=1e-3, rtol=1e-5)


@needs_avx2
def test_the_op_keeps_pytorchs_rules() -> None:
    rows, _, x = case(6, 1, 64)
    assert suits(64, 6), "compiled"
    torch.library.opcheck(torch.ops.ryzen_llm.packed_dot.default, (x, *rows))


@needs_avx2
def test_what_does_not_fit_is_refused_before_memory_is_read() -> None:
    rows, _, x = case(6, 1, 64)
    assert suits(64, 6), "compiled"
    short, _, short_x = case(3, 2, 16)
    for given in (
        (x, rows.codes, rows.scale, 4),
        (x[:-8], rows.codes, rows.scale, 6),
        (x, rows.codes, rows.scale[1:], 6),
        (x[:0], rows.codes[:, :0], rows.scale[:, :0], 6),
        (short_x, *short),
    ):
        with pytest.raises(RuntimeError, match="which do not fit"):
            packed_dot(*given)


@pytest.mark.parametrize(("group", "bits"), [(16, 3), (32, 1), (8, 8), (72, 2)])
def test_short_groups_do_not_suit(group: int, bits: int) -> None:
    """Eight codes of a plane must lie in one stretch: 16 columns of 1 bit are 2 bytes."""
    assert suits(group, bits) == (group == 8 and cpu_features().avx2)


def test_without_a_compiler_it_is_said_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("Ninja is required to load C++ extensions")

    monkeypatch.setattr("torch.utils.cpp_extension.load", fail)
    monkeypatch.setattr(module, "_is_compiled", module._is_compiled.__wrapped__)
    monkeypatch.setattr(module, "cpu_features", lambda: dataclasses.replace(cpu_features(), avx2=True))
    with pytest.warns(UserWarning, match=r"packed_dot.cpp could not be compiled.*Ninja is required"):
        assert not suits(64, 4)


def test_without_what_pytorch_compiles_with_it_is_said_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module needs setuptools, which no Python from 3.12 on brings along."""
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", None)
    monkeypatch.setattr(module, "_is_compiled", module._is_compiled.__wrapped__)
    monkeypatch.setattr(module, "cpu_features", lambda: dataclasses.replace(cpu_features(), avx2=True))
    with pytest.warns(UserWarning, match=r"packed_dot.cpp could not be compiled"):
        assert not suits(64, 4)


@needs_avx2
def test_a_process_that_was_killed_while_it_compiled_does_not_stop_the_next(tmp_path: Path) -> None:
    """PyTorch's lock is a file that only its owner deletes: the next would wait for it forever."""
    command = [sys.executable, "-c", "from ryzen_llm.kernels import packed_dot as m; assert m.suits(64, 4)"]
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    subprocess.run(command, env=environment, check=True, timeout=120)
    (built,) = tmp_path.rglob("build.ninja")
    built.with_name("lock").touch()  # as it is left behind
    subprocess.run(command, env=environment, check=True, timeout=60)
