"""Every law of every kind fails on members that break it in one place, and passes on the sound one."""

import pytest
import torch

from lightning_reg import registry
from lightning_reg.__main__ import main
from lightning_reg.engine.host.procedures import procedure
from tests.conformance.kinds import LAWS, NEED_TWO_PROCESSES
from tests.conformance.kinds.broken import BROKEN
from tests.conformance.kinds.sound import SOUND, network, sensitivity

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's command line, of jsonargparse
SHARED = {"loss": "network"}  # laws that a kind has of another one, with its broken members


@pytest.fixture
def pool(request):
    return lambda law: [request.getfixturevalue("two_processes")] if law in NEED_TWO_PROCESSES else []


def test_every_law_is_tried():
    broken = {(kind, law) for kind, law, *_ in BROKEN}
    for kind, laws in LAWS.items():
        own = {law for law in laws if law != "documented" and LAWS.get(SHARED.get(kind), {}).get(law) != laws[law]}
        assert own <= {law for of, law in broken if of == kind}


@pytest.mark.parametrize(("kind", "law"), [(kind, law) for kind, laws in LAWS.items() for law in laws])
def test_sound(kind, law, pool):
    LAWS[kind][law](SOUND[kind], *pool(law))


@pytest.mark.parametrize(
    ("kind", "law", "case", "sentence"), [pytest.param(*b, id=f"{b[0]}-{b[1]}-{n}") for n, b in enumerate(BROKEN)]
)
def test_broken(kind, law, case, sentence, pool):
    with pytest.raises(AssertionError, match=sentence):
        LAWS[kind][law](case, *pool(law))


@pytest.mark.parametrize("kind", SOUND)
def test_kinds_are_read_off_the_classes(kind):
    assert registry.kind_of(SOUND[kind].subject) == kind


def test_results_and_functions_have_no_kind():
    assert registry.kind_of(registry.Public) is None
    assert registry.kind_of(network) is None


def test_list_shows_one_kind(capsys):
    main(["list", "--kind", "metric"])
    printed = capsys.readouterr().out
    assert "ContinualMetrics" in printed
    assert "ELRCallback" not in printed
    with pytest.raises(SystemExit):
        main(["list", "--kind", "nonsense"])


def test_a_procedure_wants_a_network_first():
    with pytest.raises(TypeError, match=r"^sensitivity: the first argument must be a torch.nn.Module, got 3"):
        sensitivity(3, torch.zeros(1, 4))


def test_a_procedure_that_fails_leaves_all_as_found():
    @procedure
    def fails(module):
        module.eval()
        module[1].running_mean.add_(1.0)
        module.requires_grad_(False)
        raise KeyError("it")

    net = network()
    net[0].weight.grad = torch.ones(5, 4)
    with pytest.raises(KeyError):
        fails(net)
    assert net.training
    assert net[3].training
    assert net[0].weight.requires_grad
    assert torch.equal(net[0].weight.grad, torch.ones(5, 4))
    assert torch.equal(net[1].running_mean, torch.zeros(5))
