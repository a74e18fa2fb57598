"""A discriminator that looks through the frozen teacher's eyes: whose gradients, which maps, and what time tells it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from tsdsr.training.base import lora_config
from tsdsr.training.discriminators import Discriminator
from tsdsr.training.families import Ddpm, RectifiedFlow
from tsdsr.training.networks import FAKE_SCORE, LATENT_DISCRIMINATOR, STUDENT, TEACHER, Networks, SharedBase
from tsdsr.training.objectives import hinge_discriminator_loss, hinge_student_loss
from tsdsr.training.time_aware import Head, TeacherFeatures, TimeAwareDiscriminator

FAMILIES = ("flow", "epsilon")
SIGMA = torch.tensor([0.2, 0.7])


class Case:
    """A tiny base in its roles, whose adapters do something."""

    def __init__(self, make_pipeline, name, teacher_lora=False):
        torch.manual_seed(0)
        if name == "flow":
            pipeline, scheduler = make_pipeline("kl"), FlowMatchEulerDiscreteScheduler(shift=3.0)
            self.family, self.network = RectifiedFlow(scheduler), pipeline.transformer
            self.blocks, self.last = self.network.transformer_blocks, self.network.proj_out
        else:
            pipeline, scheduler = make_pipeline("kl", network="unet"), DDPMScheduler(beta_schedule="scaled_linear")
            self.family, self.network = Ddpm(scheduler), pipeline.unet
            self.blocks, self.last = self.network.down_blocks, self.network.mid_block
        prompt = pipeline.prompt_embeddings
        self.prompt = prompt.prompt_embeds.detach(), prompt.pooled_prompt_embeds.detach() if name == "flow" else None
        self.latents = torch.randn(2, 4, 8, 4, generator=torch.Generator().manual_seed(1))
        self.plain = copy.deepcopy(self.network)
        if teacher_lora:
            self.network.add_adapter(lora_config(2, self.family.student_targets), adapter_name=TEACHER)
        loras = {role: lora_config(2, self.family.student_targets) for role in (STUDENT, FAKE_SCORE)}
        self.denoiser = SharedBase(self.network, loras)
        with torch.no_grad():
            for weight_name, weight in self.network.named_parameters():
                if ".lora_B." in weight_name:
                    weight.normal_()

    def features(self, depths=4):
        return TeacherFeatures(self.family, self.denoiser, depths)

    def discriminator(self, **more):
        torch.manual_seed(2)
        found = TimeAwareDiscriminator(self.features(), **{"votes": 3, "time_width": 8, **more}).eval()
        with torch.no_grad():  # as if it had learnt something
            for head in found.heads:
                head.conv.weight.normal_(std=0.3)
        return found


@pytest.fixture(params=FAMILIES)
def case(request, make_pipeline):
    return Case(make_pipeline, request.param)


def test_maps_are_the_bases_own_in_every_role(case):
    """Behind each block or stage, before it halves its map; the rest of the network does not run, nothing stays."""
    taken, called = {}, []
    plain = case.plain
    if hasattr(plain, "transformer_blocks"):
        layers, wanted = list(plain.transformer_blocks), [16, 16]
    else:
        layers, wanted = [plain.down_blocks[0].resnets[-1], plain.down_blocks[1].attentions[-1]], [8, 16]
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda _, __, output, index=index: taken.update({index: output}))
    case.last.register_forward_hook(lambda *_: called.append(True))
    with torch.no_grad():
        case.family.velocity(plain, case.prompt)(case.latents, SIGMA)
    features = case.features()
    assert features.channels == wanted
    for role in (STUDENT, FAKE_SCORE, TEACHER):
        with case.denoiser.role(role):
            found = features(case.latents, SIGMA, case.prompt)
        for index, ours in enumerate(found):
            theirs = taken[index][-1] if isinstance(taken[index], tuple) else taken[index]
            theirs = getattr(theirs, "sample", theirs)
            if theirs.ndim == 3:  # tokens, row by row, of two latents a side
                theirs = theirs.view(2, 4, 2, -1).permute(0, 3, 1, 2)
            torch.testing.assert_close(ours, theirs)
            assert not ours.requires_grad
    assert not called and not any(block._forward_hooks for block in case.blocks)


def test_depths(case):
    first = case.features(1)(case.latents, SIGMA, case.prompt)
    both = case.features(2)(case.latents, SIGMA, case.prompt)
    assert len(first) == 1 and len(both) == 2
    place = 1 if hasattr(case.network, "transformer_blocks") else 0  # the middle of a transformer, a UNet's first stage
    assert torch.equal(first[0], both[place])


def test_depths_of_a_large_transformer():
    """Of 24 blocks the 5th, 10th, 15th and 20th."""

    class Deep(nn.Module):
        inner_dim, config = 8, type("Config", (), {"patch_size": 2})
        transformer_blocks = [f"block {index}" for index in range(24)]

    features = TeacherFeatures(None, SharedBase(Deep(), {}))
    assert features._blocks == ["block 4", "block 9", "block 14", "block 19"] and features.channels == [8] * 4


@pytest.mark.parametrize("teacher_lora", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_flows_through_the_teacher_into_the_latents_alone(make_pipeline, name, teacher_lora):
    """The same with gradient checkpointing, and whatever the role of the base when it flows."""
    case = Case(make_pipeline, name, teacher_lora)
    discriminator, gradients, calls = case.discriminator(), [], []
    case.blocks[0].register_forward_hook(lambda *_: calls.append(True))
    for checkpointing in (False, True):
        if checkpointing:
            case.network.enable_gradient_checkpointing()
        # diffusers' UNets recompute in training mode only.
        case.network.train(checkpointing)
        latents = case.latents.clone().requires_grad_()
        with case.denoiser.role(STUDENT):
            hinge_student_loss(discriminator.judge(latents, SIGMA, case.prompt)[-1]).backward()
        gradients.append(latents.grad)
        assert len(calls) == (3 if checkpointing else 1)  # twice, where it is recomputed
        assert case.network.is_gradient_checkpointing == checkpointing
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(gradients[1], gradients[0])
    assert all(weight.grad is None for part in (case.network, discriminator) for weight in part.parameters())
    assert all(weight.requires_grad for weight in discriminator.parameters())

    # It is the derivative.
    with torch.no_grad():
        step = 1e-2 * gradients[0] / gradients[0].norm()
        more, less = (discriminator(case.latents + way * step, SIGMA, case.prompt).mean() for way in (1, -1))
    expected = -(gradients[0] * 2 * step).sum()
    assert float(more - less) == pytest.approx(float(expected), rel=0.05)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_student_learns_through_it(make_pipeline, name):
    """One backward pass through teacher and student, which are one network, with and without recomputation."""
    case, gradients = Case(make_pipeline, name), []
    discriminator = case.discriminator()
    for checkpointing in (False, True):
        if checkpointing:
            case.network.enable_gradient_checkpointing()
        case.network.train(checkpointing)
        with case.denoiser.role(STUDENT) as network:
            latents = case.family.one_step(network, case.latents, case.prompt)
            votes = discriminator.judge(latents, SIGMA, case.prompt)[-1]
            hinge_student_loss(votes).backward()
        gradients.append({key: weight.grad for key, weight in case.network.named_parameters()})
        case.network.zero_grad()
    # By the chain rule, one after the other.
    case.network.disable_gradient_checkpointing()
    with case.denoiser.role(STUDENT) as network:
        latents = case.family.one_step(network, case.latents, case.prompt)
    apart = latents.detach().requires_grad_()
    hinge_student_loss(discriminator(apart, SIGMA, case.prompt)).backward()
    weights = case.denoiser.named_parameters(STUDENT)
    expected = torch.autograd.grad(latents, list(weights.values()), apart.grad, allow_unused=True)
    assert sum(one is not None and bool(one.any()) for one in expected) > len(weights) / 2
    for found in gradients:
        for key, one in zip(weights, expected, strict=True):
            torch.testing.assert_close(found.pop(key), one, rtol=1e-4, atol=1e-6)
        assert all(one is None for one in found.values())


def test_the_discriminators_own_step(case):
    """Its heads get gradients, nothing else does, and no graph is kept of the teacher."""
    discriminator = case.discriminator()
    maps = []
    discriminator.heads[0].register_forward_pre_hook(lambda _, given: maps.append(given[0]))
    hinge_discriminator_loss(*discriminator(case.latents, SIGMA, case.prompt).chunk(2)).backward()
    assert maps[0].grad_fn is None
    assert all(weight.grad is not None for weight in discriminator.parameters())
    assert all(weight.grad is None for weight in case.network.parameters())


def test_what_it_is_made_of(case):
    discriminator = case.discriminator()
    assert isinstance(discriminator, Discriminator)
    state = discriminator.state_dict()
    assert state and all(name.startswith("heads.") for name in state)
    trained = {id(weight) for weight in discriminator.parameters()}
    assert trained.isdisjoint(id(weight) for weight in case.network.parameters())
    positions = [8, 8] if hasattr(case.network, "transformer_blocks") else [32, 8]
    *hidden, logits = discriminator.features(case.latents, SIGMA, case.prompt)
    assert logits.shape == (2, 3 * sum(positions))
    widths = case.features().channels
    assert [tuple(one.shape) for one in hidden] == [(2, *size) for size in zip(widths, positions, strict=True)]
    narrow = case.discriminator(width=4)
    assert [one.shape[1] for one in narrow.features(case.latents, SIGMA, case.prompt)[:-1]] == [4, 4]
    for head in discriminator.heads:
        for layer in (head.votes.point[0], head.votes.line[0], head.votes.vote):
            largest = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
            assert largest == pytest.approx(1, abs=0.05)


def test_at_first_it_votes_alike_on_everything(case):
    torch.manual_seed(3)
    discriminator = TimeAwareDiscriminator(case.features(), time_width=8).eval()
    latents = case.latents.clone().requires_grad_()
    votes = discriminator(latents, SIGMA, case.prompt)
    assert torch.equal(votes[0], votes[1])
    votes.mean().backward()
    assert not latents.grad.any()
    # And yet it learns.
    assert all(head.conv.weight.grad.abs().max() > 0 for head in discriminator.heads)


def test_bfloat16(case):
    """A teacher in bfloat16 under autocast; the heads compute in float32."""
    discriminator = case.discriminator()
    wanted = discriminator(case.latents, SIGMA, case.prompt)
    case.network.to(torch.bfloat16)
    prompt = tuple(part if part is None else part.bfloat16() for part in case.prompt)
    latents = case.latents.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        *hidden, votes = discriminator.judge(latents, SIGMA, prompt)
    assert {one.dtype for one in (*hidden, votes)} == {torch.float32}
    assert (votes - wanted).abs().mean() < 0.1 * wanted.std()
    votes.mean().backward()
    assert latents.grad.isfinite().all() and latents.grad.any()
    assert {weight.dtype for weight in discriminator.parameters()} == {torch.float32}


def test_a_run_that_is_resumed_votes_the_same(case):
    """Calls change nothing; steps renew the norms; weights and norms are all there is to remember."""
    discriminator = case.discriminator()

    def step(one):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        hinge_discriminator_loss(*one(case.latents, SIGMA, case.prompt).chunk(2)).backward()
        optimizer.step()
        one.zero_grad()
        one.renew_norms()

    step(discriminator)
    state = copy.deepcopy(discriminator.state_dict())
    other = case.discriminator()
    other.load_state_dict(state)
    for _ in range(3):  # as more processes, or a validation, would
        other(case.latents, SIGMA, case.prompt)
        other.judge(case.latents, SIGMA, case.prompt)
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
    for one in (discriminator, other):
        step(one)
        assert not one.training
    moved = discriminator.state_dict()
    assert all(torch.equal(tensor, moved[name]) for name, tensor in other.state_dict().items())
    assert all(not torch.equal(tensor, state[name]) for name, tensor in moved.items() if name.endswith("._u"))


def test_it_is_one_of_the_networks(make_pipeline, case):
    """Called through them, where DDP sees it, and past it; a checkpoint holds weights and norms of the heads."""
    discriminator = case.discriminator()
    vae = make_pipeline("kl").vae
    networks = Networks(case.family, case.denoiser, SharedBase(vae, {}), latent_discriminator=discriminator)
    expected = discriminator(case.latents, SIGMA, case.prompt)
    assert torch.equal(networks(LATENT_DISCRIMINATOR, case.latents, SIGMA, prompt=case.prompt), expected)
    assert torch.equal(networks.judge(LATENT_DISCRIMINATOR, case.latents, SIGMA, case.prompt)[-1], expected)
    assert set(networks.parameters_of(LATENT_DISCRIMINATOR)) == set(discriminator.parameters())
    held = {name for name in networks.trained() if name.startswith("latent_discriminator.")}
    assert held == {f"latent_discriminator.{name}" for name in discriminator.state_dict()}
    before = copy.deepcopy(discriminator.state_dict())
    networks.stepped(LATENT_DISCRIMINATOR)
    moved = {name for name, tensor in discriminator.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(name.endswith(("._u", "._v")) for name in moved)


def test_prompts_of_a_batch_are_those_of_the_batch_twice_over(case):
    """Real and made latents are judged in one call, each with its own sample's prompt."""
    generator = torch.Generator().manual_seed(4)
    embeds, pooled = case.prompt
    prompt = torch.randn(2, *embeds.shape[1:], generator=generator), None
    if pooled is not None:
        prompt = prompt[0], torch.randn(2, *pooled.shape[1:], generator=generator)
    discriminator = case.discriminator()
    both = discriminator(torch.cat([case.latents, case.latents]), torch.cat([SIGMA, SIGMA]), prompt)
    torch.testing.assert_close(both, discriminator(case.latents, SIGMA, prompt).repeat(2, 1))
    assert not torch.allclose(both[:2], discriminator(case.latents, SIGMA, case.prompt))


def test_compiled_blocks_are_seen_through(make_pipeline):
    """And not compiled anew for it."""
    case, compiled = Case(make_pipeline, "flow"), []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    wanted = case.features()(case.latents, SIGMA, case.prompt)
    for block in case.blocks:
        block.compile(backend=backend)
    with case.denoiser.role(TEACHER) as network, torch.no_grad():
        case.family.velocity(network, case.prompt)(case.latents, SIGMA)
    before = len(compiled)
    for _ in range(2):
        found = case.features()(case.latents, SIGMA, case.prompt)
        torch.testing.assert_close(found, wanted)
    assert len(compiled) == before > 0


def test_the_heads_are_the_published_ones():
    """Normalised and modulated, 3 x 3, spectral convolutions of 1 and 9 positions around a circle, votes."""
    torch.manual_seed(0)
    head = Head(channels=64, width=8, votes=3, time_width=5).eval()
    nn.init.normal_(head.conv.weight)
    maps, time = torch.randn(2, 64, 3, 5), torch.randn(2, 5)
    scale, shift = head.modulation[1](F.silu(time))[..., None, None].split(64, dim=1)
    hidden = F.group_norm(maps, 32, head.norm.weight, head.norm.bias) * (1 + scale) + shift
    hidden = F.conv2d(F.silu(hidden), head.conv.weight, head.conv.bias, padding=1).flatten(2)

    def layer(part, hidden, kernel):
        conv, norm, _ = part
        around = F.pad(hidden, (kernel // 2, kernel // 2), mode="circular")
        hidden = F.conv1d(around, conv.weight, conv.bias)
        return F.leaky_relu(F.group_norm(hidden, 4, norm.weight, norm.bias), 0.2)

    hidden = layer(head.votes.point, hidden, 1)
    hidden = (hidden + layer(head.votes.line, hidden, 9)) / 2**0.5
    votes = F.conv1d(hidden, head.votes.vote.weight, head.votes.vote.bias).flatten(1)
    torch.testing.assert_close(head(maps, time), (hidden, votes))


def test_what_cannot_be_used(make_pipeline, one_sentence):
    case = Case(make_pipeline, "epsilon")
    with pytest.raises(ValueError) as error:
        case.features(0)
    one_sentence(error.value, "depths", "0")
    for name in ("width", "votes", "time_width"):
        with pytest.raises(ValueError) as error:
            case.discriminator(**{name: 0})
        one_sentence(error.value, name, "0")
    with pytest.raises(ValueError) as error:
        case.discriminator()(case.latents[..., :2, :2], SIGMA, case.prompt)
    one_sentence(error.value, "(2, 2)", "too small")


class Eyes:
    """A teacher that shows latents as they are, whatever the level."""

    channels = [4]

    def __call__(self, latents, sigma, prompt):
        return [latents]


def spots(generator, count=24):
    """Real latents have bright spots where there is little noise and dark ones where there is much; made ones the other
    way round: without the level nobody can tell them apart.
    """
    sigma = torch.rand(count, generator=generator)
    real = torch.rand(count, generator=generator) < 0.5
    bright = (sigma < 0.5) == real
    spot = (torch.rand(count, 4, 6, 6, generator=generator) < 0.1).float()
    latents = torch.where(bright, 1.0, -1.0).view(-1, 1, 1, 1) * 3 * spot
    return latents + 0.3 * torch.randn(latents.shape, generator=generator), sigma, real


@pytest.mark.parametrize("time_aware", [True, False])
def test_time_tells(time_aware):
    """What is real depends on time. Told it, the discriminator learns that, and is lost with another's time."""
    torch.manual_seed(0)
    discriminator = TimeAwareDiscriminator(Eyes(), width=8, votes=2, time_width=16, time_aware=time_aware).eval()
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(80):
        latents, sigma, real = spots(generator)
        votes = discriminator(latents, sigma, None)
        hinge_discriminator_loss(votes[real], votes[~real]).backward()
        optimizer.step()
        optimizer.zero_grad()
        discriminator.renew_norms()

    latents, sigma, real = spots(torch.Generator().manual_seed(2), 200)

    def right(levels):
        with torch.no_grad():
            votes = discriminator(latents, levels, None).mean(dim=1)
        return float(((votes > votes.median()) == real).float().mean()), votes

    order = torch.randperm(len(sigma), generator=torch.Generator().manual_seed(3))
    (share, votes), (shuffled, other), (swapped, _) = right(sigma), right(sigma[order]), right(1 - sigma)
    if time_aware:
        assert share > 0.9 and 0.3 < shuffled < 0.7 and swapped < 0.2
    else:
        assert 0.3 < share < 0.7 and torch.equal(votes, other)
