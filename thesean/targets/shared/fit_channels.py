"""Which channels of a group to keep, and what reads them then: fitted to the guide, group after group.

B batch, C channels, O output channels, I input channels, K taps of a kernel, W channels of a group, S those kept,
N places of maps, F what a kernel meets at a place
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from thesean.targets.shared.channel_groups import ChannelFacts, Channels, keep_rows
from thesean.targets.shared.channels import Convolution, Weights, needs, run_step
from thesean.targets.shared.select_features import fold, moments, select_features, select_groups

# Places of maps that a selection looks at, per channel. Neighbours are alike, so it is more than tokens per neuron.
PLACES_PER_CHANNEL = 16
# Of how many examples, where there are as many: fewer where maps are so large that these would hold more numbers than
# `NUMBERS`, but some all the same.
EXAMPLES, FEWEST, NUMBERS = 256, 16, 2**26
# A convolution that reads more than this at a place is not solved for tap by tap: its statistics would take minutes.
SOLVED_FEATURES = 1024


def patches(x: torch.Tensor, step: Convolution) -> torch.Tensor:
    """What the kernel meets at each place, (B, places..., C, taps...): a view where nothing is padded."""
    pads = [p for size in reversed(step.padding) for p in (size, size)]
    x = F.pad(x, pads) if any(pads) else x
    for dim, (size, stride, dilation) in enumerate(zip(step.kernel, step.stride, step.dilation, strict=True), 2):
        x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return x.movedim(1, 1 + len(step.kernel))


class Narrowing:
    """A part as it loses channels: `weights` are its own by now, and what they give on some examples is known as far as
    it is needed, beside what the guide's give. Groups come in order.
    """

    def __init__(self, facts: ChannelFacts, inputs: Sequence[torch.Tensor]) -> None:
        """`inputs` are the guide's at the part's entry, one a batch."""
        self.steps, self.maps = facts.steps, facts.maps
        self.guide = {n: own.to(torch.float32) for n, own in facts.weights.items()}
        self.weights = dict(self.guide)
        self._kept: dict[int, torch.Tensor] = {}  # of convolutions by now the rows that stay
        self._batches = [x.float() for x in _some(inputs, facts)]
        self._theirs: list[dict[int, torch.Tensor]] = [{0: x} for x in self._batches]
        self._ours: list[dict[int, torch.Tensor]] = [{0: x} for x in self._batches]
        values = range(len(self.steps) + 1)
        self._last_read = {v: max((n for n, s in enumerate(self.steps) if v in s.reads), default=0) for v in values}
        self._begun_from = {0, *(s.of for s in self.steps if isinstance(s, Convolution))}

    def keep(self, channels: Channels, count: int) -> None:
        """So many channels of a group. Raises ValueError where activations are not finite."""
        for known in (*self._theirs, *self._ours):
            for value in [v for v in known if v and self._last_read[v] < channels.makers[0]]:
                del known[value]
        readers: dict[int, list[int]] = {}
        for number in channels.readers:
            readers.setdefault(self.steps[number].of, []).append(number)
        # what is read at most places says which channels matter
        chief = max(readers, key=lambda value: self.maps[value].places * len(readers[value]))
        matrix_OW = torch.cat([_by_channel(self.guide[n].weight) for n in readers[chief]])
        # before any of the readers' weights is another
        theirs, ours = ({value: self._rows(value, theirs=who) for value in readers} for who in (True, False))
        covariance_WW = moments(theirs[chief]).covariance_EE
        if channels.block > 1:
            best = select_groups(covariance_WW, matrix_OW, channels.block, count // channels.block)
            kept_S = in_blocks(best, channels.block)
        else:
            kept_S = select_features(covariance_WW, matrix_OW, count)
        for value, numbers in readers.items():
            self._fold(numbers, kept_S, theirs[value], ours[value])
        keep_rows(self.weights, channels, kept_S)
        self._kept |= dict.fromkeys(channels.makers, kept_S)
        made = {maker + 1 for maker in channels.makers}
        for known in self._ours:  # whatever comes of the group is another value now
            for value in [v for v in known if not made.isdisjoint(needs(self.steps, v))]:
                del known[value]
        for number in channels.readers:
            self._refit(number)

    def _fold(
        self,
        readers: Sequence[int],
        kept_S: torch.Tensor,
        theirs: Sequence[torch.Tensor],
        ours: Sequence[torch.Tensor],
    ) -> None:
        """Into what reads a value, place by place, what the channels that are kept say of it as the guide has it."""
        together = []
        for f_NW, g_NW in zip(theirs, ours, strict=True):
            kept_NS, missing_NW = g_NW[:, kept_S], f_NW.clone()
            missing_NW[:, kept_S] -= kept_NS
            together.append(torch.cat([missing_NW, kept_NS], 1))
        known = moments(together)
        all_channels = theirs[0].shape[1]
        at_S = torch.arange(all_channels, all_channels + len(kept_S), device=kept_S.device)
        for number in readers:
            weight, bias = self.guide[number]
            assert bias is not None
            full_OW = _by_channel(weight)
            made_OS, shift_O = fold(known, torch.cat([full_OW, full_OW[:, kept_S]], 1), at_S)
            made = made_OS.unflatten(0, (len(weight), -1)).movedim(2, 1).reshape(len(weight), -1, *weight.shape[2:])
            shift = shift_O.view(len(weight), -1).sum(1)
            rows = self._kept.get(number, slice(None))
            self.weights[number] = Weights(made.to(weight)[rows], (bias.double() + shift).to(bias)[rows])

    def _refit(self, number: int) -> None:
        """A convolution's weights, all taps at once, onto what it gave in the guide; where they are few enough."""
        step = self.steps[number]
        assert isinstance(step, Convolution)
        weight, bias = self.weights[number]
        assert bias is not None
        outputs, features = len(weight), weight[0].numel()
        if math.prod(step.kernel) == 1 or features > SOLVED_FEATURES:
            return
        total = sum(len(x) for x in self._batches) * self.maps[number + 1].places
        stride = max(1, total // (PLACES_PER_CHANNEL * features))
        together = []
        for at in range(len(self._batches)):
            met = patches(self._value(step.of, at, theirs=False), step)
            wanted = self._value(number + 1, at, theirs=True).movedim(1, -1)
            wanted = wanted[..., self._kept.get(number, slice(None))]
            places = _every(wanted.shape[:-1], stride, met.device)
            read_NF, wanted_NO = met[places].flatten(1), wanted[places]
            missing_NO = wanted_NO - F.linear(read_NF, weight.flatten(1), bias)
            together.append(torch.cat([missing_NO, read_NF], 1))
        matrix = torch.cat([torch.eye(outputs).to(weight), weight.flatten(1)], 1)
        at_F = torch.arange(outputs, outputs + features, device=weight.device)
        made_OF, shift_O = fold(moments(together), matrix, at_F)
        self.weights[number] = Weights(made_OF.view(weight.shape).to(weight), (bias.double() + shift_O).to(bias))

    def _rows(self, value: int, *, theirs: bool) -> list[torch.Tensor]:
        """A value at places of the maps, (N, C) each, spread evenly: as many as a selection looks at."""
        channels, places = self.maps[value]
        total = sum(len(x) for x in self._batches) * places
        stride = max(1, total // (PLACES_PER_CHANNEL * channels))
        found = (self._value(value, at, theirs=theirs).movedim(1, -1) for at in range(len(self._batches)))
        return [rows[_every(rows.shape[:-1], stride, rows.device)] for rows in found]

    def _value(self, value: int, at: int, *, theirs: bool) -> torch.Tensor:
        """Of one batch, from what is known of it."""
        known = (self._theirs if theirs else self._ours)[at]
        weights = self.guide if theirs else self.weights
        if value not in known:
            step = self.steps[value - 1]
            read = [self._value(of, at, theirs=theirs) for of in step.reads]
            known[value] = run_step(step, weights.get(value - 1), *read)
            for of in step.reads:  # what no convolution reads is quickly made again, and as large as any
                if of not in self._begun_from and self._last_read[of] < value:
                    known.pop(of, None)
        return known[value]


def in_blocks(kept: torch.Tensor, block: int) -> torch.Tensor:
    """The channels of blocks."""
    return (kept.unsqueeze(1) * block + torch.arange(block, device=kept.device)).flatten()


def _by_channel(weight: torch.Tensor) -> torch.Tensor:
    """(O, I, K...) -> (O K, I): what each input channel does, tap by tap."""
    return weight.reshape(*weight.shape[:2], -1).movedim(1, 2).flatten(0, 1)


def _every(shape: Sequence[int], stride: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The indices of one place in `stride`, over all examples."""
    return torch.unravel_index(torch.arange(0, math.prod(shape), stride, device=device), tuple(shape))


def _some(inputs: Sequence[torch.Tensor], facts: ChannelFacts) -> list[torch.Tensor]:
    """As many examples as a selection needs, from all batches."""
    total = sum(map(len, inputs))
    grown = math.prod(inputs[0].shape[1:]) / (facts.maps[0].channels * facts.maps[0].places)
    largest = grown * max(m.channels * m.places for m in facts.maps)
    wanted = max(FEWEST, min(EXAMPLES, int(NUMBERS / largest)))
    return [x[:: max(1, total // wanted)] for x in inputs]
