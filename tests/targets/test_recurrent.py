"""What every recurrent family promises.

B batch, T time, D width
"""

from __future__ import annotations

import pytest
import torch

from tests.targets.build import build
from tests.targets.contract import PARTS, fits, recurrent_families
from thesean.errors import TargetMismatchError
from thesean.targets import PartFacts, get_family

# chunks, states, widths of the output and other promises of all families alike: tests/targets/contract.py
RECURRENT = recurrent_families()
pytestmark = pytest.mark.parametrize("name", RECURRENT)


@pytest.mark.parametrize("chunks", [(1, 5, 1, 13), (1,) * 20])
def test_whole_blocks_in_chunks_of_any_size_equal_all_steps_at_once(name, chunks, sequence_part):
    module = build(name, sequence_part(), scope="part").eval()
    x_BTD = torch.randn(3, 20, 16)
    full_BTD, full_state = module(x_BTD)
    outputs, state = [], None
    for chunk_BTD in x_BTD.split(chunks, dim=1):
        y_BTD, state = module(chunk_BTD, state)
        outputs.append(y_BTD)
    torch.testing.assert_close(torch.cat(outputs, 1), full_BTD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, full_state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mixing", ["none", "causal", "bidirectional"])
@pytest.mark.parametrize("width_out", [16, 5])
def test_output_has_the_width_of_the_part(name, mixing, width_out, sequence_part):
    module = build(name, sequence_part(mixing, width_out=width_out), scope="part")
    out = module(torch.randn(2, 7, 16))
    assert module.stateful == (mixing != "bidirectional")
    assert (out[0] if module.stateful else out).shape == (2, 7, width_out)


@pytest.mark.parametrize("mixing", ["causal", "bidirectional"])
def test_only_bidirectional_modules_see_the_future(name, mixing, sequence_part):
    module = build(name, sequence_part(mixing)).eval()
    x_BTD = torch.randn(2, 9, 16)
    moved_BTD = x_BTD.clone()
    moved_BTD[:, 4, 0] += 1  # of all features alike, a norm would take it off

    def run(x: torch.Tensor) -> torch.Tensor:
        return module(x)[0] if module.stateful else module(x)

    change_T = (run(moved_BTD) - run(x_BTD)).abs().amax((0, 2))
    if mixing == "causal":
        assert not change_T[:4].any()
    else:
        assert (change_T[:4] > 1e-6).all()
    assert (change_T[4:] > 1e-6).all()  # and all of them remember the past


def test_output_is_last_of_features_plus_skip(name, sequence_part):
    module = build(name, sequence_part(), scope="part").eval()
    x_BTD = torch.randn(2, 6, 16)
    features, state = module.features(x_BTD)
    y_BTD, y_state = module(x_BTD)
    assert features.shape == (2, 6, module.last.in_features)
    torch.testing.assert_close(y_BTD, module.last(features) + x_BTD)
    torch.testing.assert_close(y_state, state)
    if get_family(name).scope == "mixing":
        assert build(name, sequence_part()).skip(x_BTD) is None
    assert build(name, sequence_part(width_out=3), scope="part").skip(x_BTD) is None


@pytest.mark.thorough
@pytest.mark.parametrize("mixing", ["causal", "bidirectional"])
def test_loss_falls_on_a_toy_part(name, mixing, sequence_part):
    module = build(name, sequence_part(mixing))
    guide = torch.nn.Linear(16, 16)
    x_BTD = torch.randn(16, 12, 16)
    with torch.no_grad():  # a running mean, and the whole mean: both need memory
        mean_BTD = x_BTD.cumsum(1) / torch.arange(1, 13).view(-1, 1)
        wanted_BTD = guide(mean_BTD if mixing == "causal" else x_BTD.mean(1, keepdim=True).expand_as(x_BTD))
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        out = module(x_BTD)
        loss = (out[0] if module.stateful else out).sub(wanted_BTD).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    variance = wanted_BTD.var().item()
    assert losses[-1] < 0.35 * losses[0]
    assert losses[-1] < 0.5 * variance  # better than any constant
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.thorough
@pytest.mark.parametrize(("spread", "bound"), [(0.02, 2.0), (0.25, 20.0)], ids=["as built", "as trained"])
def test_gradients_stay_healthy_through_24_blocks(name, spread, bound, sequence_part):
    blocks = [build(name, sequence_part(), scope="part") for _ in range(24)]
    x_BTD = y_BTD = torch.randn(4, 64, 16)
    for block in blocks:
        # 0.25 keeps the size of 16 inputs
        torch.nn.init.normal_(block.last.weight, std=spread * (16 / block.last.in_features) ** 0.5)
        y_BTD, _ = block(y_BTD)
    (y_BTD * torch.randn_like(x_BTD)).sum().backward()
    first, last = (
        torch.stack([p.grad.norm() for p in block.parameters() if p.grad is not None]).norm().item()
        for block in (blocks[0], blocks[-1])
    )
    assert y_BTD.std() < 10
    assert 1 / bound < first / last < bound


@pytest.mark.parametrize(
    ("input_shape", "output_shape", "expected"),
    [
        (("batch", 3, 8, 8), ("batch", 3, 8, 8), r"expected a sequence \(batch, time, width\)"),
        (("batch", 16), ("batch", 16), r"found \(batch, 16\) -> \(batch, 16\)\. Choose target 'mlp'"),
        (("batch", "time", "width"), ("batch", "time", "width"), "expected static widths"),
        (("batch", "time", 16), ("batch", "half", 16), "expected as many steps out as in"),
    ],
)
def test_a_part_that_is_no_sequence_is_refused(name, input_shape, output_shape, expected):
    if fits(get_family(name), PARTS["feature map"]):
        pytest.skip("takes feature maps as well, and says so: test_conv")
    part = PartFacts(path="stem.conv", input_shape=input_shape, output_shape=output_shape, mixing="none", params=1)
    with pytest.raises(TargetMismatchError, match=rf"^stem\.conv: target '{name}' .*{expected}"):
        build(name, part)


def test_flops_grow_with_the_tokens(name, sequence_part):
    part = sequence_part()
    module = build(name, part)
    one = module.flops(part, {"batch": 1, "time": 1})
    assert one >= 2 * module.last.weight.numel()
    assert module.flops(part, {"batch": 3, "time": 10}) == 30 * one


def test_a_part_that_widens_gets_features_as_wide_as_what_it_puts_out(name):
    narrow, wide = ("batch", "time", 8), ("batch", "time", 32)
    widths = [
        build(name, PartFacts(path="cell", input_shape=i, output_shape=o, mixing="causal", params=1)).last.in_features
        for i, o in ((narrow, wide), (narrow, narrow))
    ]
    assert widths[0] >= 32
    assert widths[0] > widths[1]
