"""Every launch that real sizes make is compiled ahead of time, for architectures that are not here.

Host functions run on meta tensors with the launch caught: what is compiled is what would be launched, strides, tiles
and specialisations included.
"""

from __future__ import annotations

import re

import pytest
import torch
import triton_resources
from triton_launches import OPS, SIZES, TARGETS, D, compiled, distinct, key, launches_of


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", OPS)
def test_compiles_and_fits(op, size, dtype, target) -> None:
    gpu, architecture, shared = TARGETS[target]
    launches = distinct(launches_of(op, dtype, SIZES[size], architecture))
    assert launches
    for launch in launches:
        made, name = compiled(launch, gpu), launch.kernel.fn.__name__
        assert made.metadata.shared <= shared, f"{name} wants {made.metadata.shared} bytes of shared memory"
        assert "cubin" in made.asm or "hsaco" in made.asm


@pytest.mark.parametrize("op", OPS)
def test_one_key_compiles(op) -> None:
    """Triton turns an argument that is 1 into a constant: other code."""
    for launch in distinct(launches_of(op, torch.float32, 1)):
        compiled(launch)


@pytest.mark.parametrize("op", OPS)
def test_matrices_with_adjacent_rows_compile(op) -> None:
    """A stride of 1 is a constant too, and no tensor: it has no `.to`."""
    for launch in distinct(launches_of(op, torch.float32, 8, turned=True)):
        compiled(launch)


@pytest.mark.parametrize("op", OPS)
def test_matrices_of_one_element_compile(op) -> None:
    for launch in distinct(launches_of(op, torch.float32, 1, d=1, v=1)):
        compiled(launch)


@pytest.mark.parametrize("op", ["gain_products", "rls_update_"])
def test_thousands_of_keys_need_no_workspace_beyond_their_results(op) -> None:
    """A partial G for every block of rows of C would take 64 times a G."""
    u = D
    sizes = [
        value.numel()
        for launch in launches_of(op, torch.float32, u)
        for value in launch.arguments.values()
        if isinstance(value, torch.Tensor)
    ]
    assert max(sizes) == u * u


@pytest.mark.parametrize(("op", "count"), [("qr_append_", 1), ("qr_append_rhs_", 1), ("qr_gain", 2)])
def test_panels_take_no_launches_of_their_own(op, count) -> None:
    """Programs wait for panels on the device; a launch a panel would cost more than the panel."""
    assert len(launches_of(op, torch.float32, 100)) == count


def test_programs_that_wait_release_and_acquire() -> None:
    """What a panel stored is made visible before its flag, and nothing older is kept once the flag is seen."""
    launches = launches_of("qr_append_", torch.float32, 100)
    ptx = compiled(launches[0]).asm["ptx"]
    assert re.search(r"\b(atom|ld)\.global\.gpu\.acquire\b", ptx)
    assert re.search(r"\batom\.global\.gpu\.release\.exch\b", ptx)
    assert ".global.nc" not in ptx


def test_a_column_step_exchanges_one_vector() -> None:
    """From warp to warp. Layouts that do not fit would be exchanged as well, in silence: tiles of G, of S or of T."""
    text = compiled(launches_of("qr_append_", torch.float32, 100)[0]).asm["ttgir"]
    lines = text.splitlines()
    (gather,) = (i for i, line in enumerate(lines) if "tt.gather" in line)
    first = next(i for i in range(gather, 0, -1) if "scf.while" in lines[i])
    last = next(i for i in range(gather, len(lines)) if "scf.yield" in lines[i])
    step = "\n".join(lines[first:last])
    assert "tt.reduce" in step
    assert not re.findall(r"ttg.convert_layout .*tensor<\d+x\d\d+x", step)


@pytest.mark.parametrize("op", ["qr_append_", "qr_append_rhs_", "qr_gain"])
def test_the_number_of_rows_is_no_part_of_the_code(op) -> None:
    """The last batch of a stream, smaller than the others, does not wait for a compilation of seconds."""
    seen = []
    for u in (65, 100, 112):
        seen.append({key(launch) for launch in launches_of(op, torch.float32, u)})
    assert seen[0] == seen[1] == seen[2]


def test_two_programs_of_the_products_share_a_multiprocessor() -> None:
    """Of Hopper, with its 227 KB of shared memory."""
    launches = launches_of("gain_products", torch.float32, 100)
    product = next(launch for launch in launches if launch.kernel.fn.__name__ == "gain_products_kernel")
    assert 2 * (compiled(product).metadata.shared + 1024) <= 227 * 1024


def test_float32_products_run_on_tensor_cores_of_hopper() -> None:
    """3xTF32 is three tensor-core products, not a loop of fused multiply-adds."""
    launches = launches_of("gain_products", torch.float32, 100)
    product = next(launch for launch in launches if launch.kernel.fn.__name__ == "gain_products_kernel")
    ptx = compiled(product).asm["ptx"]
    assert ".tf32" in ptx


def test_the_innovation_has_work_for_every_multiprocessor() -> None:
    """K W has 32 tiles here: its shared dimension is cut, and a third launch adds the parts."""
    launches = launches_of("weight_update_", torch.float32, 100)
    assert [launch.kernel.fn.__name__ for launch in launches] == ["product_kernel", "sum_kernel", "product_kernel"]
    assert launches[0].arguments["span"] == 512


@pytest.mark.parametrize("u", [100, D])
@pytest.mark.parametrize("op", OPS)
def test_layers_go_in_the_same_launches(op, u) -> None:
    assert len(launches_of(op, torch.float32, u, layers=(2, 3))) <= len(launches_of(op, torch.float32, u))


def test_a_whole_commit_is_five_launches() -> None:
    assert len(launches_of("rls_update_", torch.float32, 100)) == 5


def test_loops_are_read_from_machine_code() -> None:
    """Of two loops, one in the other, the inner; of one around a short one, the outer."""
    lines = ["MOV R1, R2"] * 200
    lines[60] = "@P0 BRA 0x140"  # 40 instructions from 0x14 x 16 on
    lines[90] = "@!P1 BRA 0xa0"  # around it
    lines[150], lines[160] = "BAR.SYNC 0x0", "BRA.U 0x9b0"  # short
    lines[170] = "@P2 BRA `(.L_x) 0x820"
    sass = "\n".join(f"        /*{16 * i:04x}*/                   {text} ;" for i, text in enumerate(lines))
    found = triton_resources.loops(sass)
    assert [len(body) for body in found] == [41, 41]
    assert triton_resources.described(found[1]) == "41 instructions (1 BAR)"
