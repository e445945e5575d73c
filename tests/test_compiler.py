"""The operators under torch's compilers and modes: opcheck, compile, export, AOTInductor, autocast, FLOP counting."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from operator_cases import LAYOUTS, make_case

import rbe_torch  # noqa: F401  registers the operators

pytestmark = pytest.mark.usefixtures("device")


class Product(torch.nn.Module):
    """A module around one operator call, with its tensors as buffers and parameters."""

    def __init__(self, case):
        super().__init__()
        self.codes = torch.nn.Buffer(case.codes)
        self.basis, self.gain, self.bias = (torch.nn.Parameter(t) for t in (case.basis, case.gain, case.bias))
        self.keywords = case.keywords

    def forward(self, x):
        return torch.relu(torch.ops.rbe.linear(x * 2, self.codes, self.basis, self.gain, self.bias, **self.keywords))


@pytest.mark.parametrize("layout", LAYOUTS + ["rbe8x2_g8+int8", "rbe22_g8+lr2"])
def test_opcheck_of_every_operator(layout):
    amplitude = layout.startswith(("rbe22", "rbe32", "rbe9r", "rbe4r", "rbe2r"))
    for grad in (False, True):
        case = make_case(layout, 5, 19, (2, 3), amplitude=amplitude)
        if grad:
            case.require_grad()
        torch.library.opcheck(torch.ops.rbe.linear.default, case.tensors, case.keywords)
        torch.library.opcheck(torch.ops.rbe.linear_backward.default, (torch.randn(2, 3, 5), *case.tensors), case.keywords)
        torch.library.opcheck(torch.ops.rbe.decode.default, (*case.tensors[1:4], *case.tensors[5:]), case.keywords)
    packed = torch.ops.rbe.pack(case.codes, **case.keywords)
    torch.library.opcheck(torch.ops.rbe.linear_inference.default, make_case(layout, 5, 19).tensors, case.keywords)
    torch.library.opcheck(torch.ops.rbe.pack.default, (case.codes,), case.keywords)
    torch.library.opcheck(torch.ops.rbe.unpack.default, (packed,), case.keywords)
    torch.library.opcheck(torch.ops.rbe.encode.default, (torch.randn(5, 19), case.basis.detach(), case.gain.detach()), case.keywords)


@pytest.mark.parametrize("layout", ["rbe22_g8", "rbe8x2_g8"])
def test_compile_without_graph_breaks_forward_and_backward(layout):
    module = Product(make_case(layout, 5, 19))
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for tokens in (3, 7, 1):
        x = torch.randn(tokens, 19)
        results = []
        for f in (module, compiled):
            leaf = x.clone().requires_grad_()
            y = f(leaf)
            results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, module.basis, module.gain, module.bias])))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("strict", [True, False])
def test_export_keeps_the_operator_and_dynamic_tokens(strict):
    module = Product(make_case("rbe22_g8", 5, 19))
    program = torch.export.export(module, (torch.randn(4, 19),), dynamic_shapes={"x": {0: torch.export.Dim("T")}}, strict=strict)
    assert any(node.target == torch.ops.rbe.linear.default for node in program.graph.nodes)
    x = torch.randn(9, 19)
    torch.testing.assert_close(program.module()(x), module(x))
    lowered = program.run_decompositions()
    torch.testing.assert_close(lowered.module()(x), module(x))


def test_aot_inductor_package_runs_in_a_fresh_process(tmp_path):
    module = Product(make_case("rbe22_g8", 5, 19)).eval()
    x = torch.randn(6, 19)
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: torch.export.Dim("T")}})
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        torch.save((x, module(x)), tmp_path / "pair.pt")
    script = (
        "import sys, torch, rbe_torch\n"
        "model = torch._inductor.aoti_load_package(sys.argv[1] + '/model.pt2')\n"
        "x, y = torch.load(sys.argv[1] + '/pair.pt')\n"
        "torch.testing.assert_close(model(x), y)\n"
        "print('same')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_activations_and_nothing_of_the_format(dtype):
    case = make_case("rbe32_g16", 7, 40, (6,), amplitude=True).require_grad()
    device = case.x.device.type
    with torch.autocast(device, dtype):
        y = case.run()
    assert y.dtype == dtype
    assert torch.equal(y, case.run(x=case.x.to(dtype)))
    y.float().square().sum().backward()
    assert case.x.grad.dtype == torch.float32 and case.amplitude.grad.dtype == torch.float32
    with torch.autocast(device, dtype), torch.no_grad():
        assert torch.ops.rbe.linear_inference(*case.tensors, **case.keywords).dtype == dtype


def test_flop_counter_counts_the_compressed_product():
    from torch.utils.flop_counter import FlopCounterMode

    case = make_case("rbe22_g8", 50, 80, (6,)).require_grad()
    with FlopCounterMode(display=False) as counter:
        y = case.run()
    table, gather = 2 * 6 * 256 * 80, 2 * 6 * 50 * 10
    assert counter.get_total_flops() == table + gather
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 3 * table + 2 * gather
