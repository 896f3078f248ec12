"""What the library must survive: threads, a fork, Ctrl-C, and numbers that are none.

T tokens, D width, E experts, K slots a token.
"""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mixtura.nn import Experts
from mixtura.nn.backends.native import instructions, native_backend, use_instructions
from mixtura.nn.backends.native.ops import OPERATOR

ISAS = instructions()[1]
BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.fixture(autouse=True)
def best_instructions():
    yield
    use_instructions(ISAS[0])


def call(T=33, K=2, E=4, D=80, F=72, seed=0, dtype=torch.float32, **options):
    """Experts of deviation 0.3 and a call of them; expert E - 1 and some slots are empty."""
    generator = torch.Generator().manual_seed(seed)
    experts = Experts(E, D, F, **options).requires_grad_(False)
    for parameter in experts.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    indices_TK = torch.randint(0, E, (T, K), generator=generator)
    indices_TK[indices_TK == E - 1] = E
    hidden_TD = torch.randn(T, D, generator=generator).to(dtype)
    return experts.to(dtype), hidden_TD, indices_TK, torch.rand(T, K, generator=generator)


def everything(experts, hidden_TD, indices_TK, weights_TK):
    """Output and gradients of tokens, weights of slots and experts."""
    leaves = [hidden_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_(), *experts.parameters()]
    for leaf in leaves:
        leaf.requires_grad_()
    out_TD = native_backend(experts, leaves[0], indices_TK, leaves[1])
    return [out_TD.detach(), *torch.autograd.grad(out_TD.sum(), leaves)]


def test_two_models_in_two_threads_give_the_same_bits_as_alone():
    calls = [call(seed=1), call(T=41, D=64, F=96, seed=2)]
    alone = [everything(*one) for one in calls]
    with ThreadPoolExecutor(2) as threads:
        for _ in range(10):
            for found, wanted in zip(threads.map(lambda one: everything(*one), calls), alone, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


PROCESS = """
import json, os, signal, threading, time, torch
from mixtura.nn import Experts
from mixtura.nn.backends.native import native_backend

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a process that a shell put into the background
torch.set_num_threads(2)
experts = Experts(4, 256, 256).requires_grad_(False)
call = experts, torch.randn(4096, 256), torch.randint(0, 5, (4096, 2)), torch.rand(4096, 2)
wanted = native_backend(*call)
seen = {}

def in_child():
    seen = [torch.equal(native_backend(*call), wanted)]
    thread = threading.Thread(target=lambda: seen.append(torch.equal(native_backend(*call), wanted)))
    thread.start()
    thread.join()
    return seen == [True, True]

child = os.fork()
if child == 0:
    signal.alarm(200)
    os._exit(0 if in_child() else 1)
seen["child"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
seen["parent"] = torch.equal(native_backend(*call), wanted)

def interrupt():
    time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)

try:
    threading.Thread(target=interrupt).start()
    native_backend(*call)
    time.sleep(60)
    seen["interrupted"] = False
except KeyboardInterrupt:
    seen["interrupted"] = True
seen["afterwards"] = torch.equal(native_backend(*call), wanted)
print(json.dumps(seen))
"""


def test_a_forked_process_and_one_that_was_interrupted_compute_as_before():
    """Without an end for threads that the child does not have (its exit code would be that of an alarm, -14)."""
    done = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen == {"child": 0, "parent": True, "interrupted": True, "afterwards": True}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
def test_a_token_that_is_not_finite_touches_no_other(isa, dtype, bad):
    use_instructions(isa)
    for options in ({}, {"gated": False, "activation": "relu2"}, {"transposed": True, "activation": "gelu"}):
        arguments = call(dtype=dtype, **options)
        wanted = everything(*arguments)
        others = torch.arange(33) != 7
        arguments[2][7] = torch.tensor([1, 0])
        arguments[1][7, 3] = bad
        found = everything(*arguments)
        for one, other in zip(found[:3], wanted[:3], strict=True):
            assert torch.equal(one[others], other[others])
        assert not found[0][7].isfinite().any()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_a_weight_that_is_not_finite_touches_only_tokens_of_its_expert(isa, name, bad):
    use_instructions(isa)
    arguments = call()
    wanted = everything(*arguments)
    with torch.no_grad():
        getattr(arguments[0], name)[1, 5, 6] = bad
    found = everything(*arguments)
    touched = (arguments[2] == 1).any(1)
    assert torch.equal(found[0][~touched], wanted[0][~touched])
    assert torch.equal(found[1][~touched], wanted[1][~touched])
    assert (~found[0][touched].isfinite()).any(1).all()
    for one, other in zip(found[3:], wanted[3:], strict=True):
        assert torch.equal(one[[0, 2, 3]], other[[0, 2, 3]])


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "linear"])
@pytest.mark.parametrize("isa", ISAS)
def test_no_activation_hides_what_is_not_a_number(isa, activation):
    use_instructions(isa)
    for gated in (True, False):
        experts, hidden_TD, indices_TK, weights_TK = call(gated=gated, activation=activation)
        indices_TK.clamp_(max=2)
        hidden_TD[::2] = torch.nan
        out_TD = native_backend(experts, hidden_TD, indices_TK, weights_TK)
        assert out_TD[::2].isnan().all()
        assert out_TD[1::2].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
def test_the_clamped_gate_hides_none_either(isa):
    use_instructions(isa)
    experts, hidden_TD, indices_TK, weights_TK = call()
    indices_TK.clamp_(max=2)
    hidden_TD[::2] = torch.nan
    clamped = (7, True, False, False, 1.702, 7.0)
    out_TD, _ = OPERATOR(
        hidden_TD, indices_TK, weights_TK, experts.gate_up_proj, experts.down_proj, None, None, *clamped, False
    )
    assert out_TD[::2].isnan().all()
    assert out_TD[1::2].isfinite().all()
