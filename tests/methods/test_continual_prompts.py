"""The prompt pool: choices, tokens, the key loss and its gradients against loops in float64; state, misuse."""

from __future__ import annotations

import math

import pytest
import torch

from tlkernels.methods.continual.prompts import PromptPool

DTYPE = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def made(**kwargs):
    return PromptPool(6, 2, 4, **{"top_k": 3, "query_features": 5, "dtype": DTYPE, **kwargs})


def distance(q, k):
    dot = sum(float(a) * float(b) for a, b in zip(q, k, strict=True))
    return 1 - dot / math.sqrt(sum(float(a) ** 2 for a in q) * sum(float(b) ** 2 for b in k))


def test_choices_tokens_and_loss():
    pool, x, q = made(), randn(3, 7, 4), randn(3, 5, seed=1)
    tokens, pull = pool(x, q)
    total, counts = 0.0, [0] * 6
    for n in range(3):
        known = [distance(q[n], k) for k in pool.keys.detach()]
        best = sorted(range(6), key=known.__getitem__)[:3]
        total += sum(known[s] for s in best)
        for s in best:
            counts[s] += 1
        assert torch.equal(tokens[n], torch.cat([*(pool.prompts[s] for s in best), x[n]]))
        assert pool.select(q)[n].tolist() == best
    assert float(pull.detach()) == pytest.approx(total / 3, rel=1e-12)
    assert pool.counts.tolist() == counts


def test_gradients_reach_chosen_prompts_and_keys_only():
    pool, x = made(top_k=2), randn(2, 3, 4)
    q = randn(2, 5, seed=1).requires_grad_()
    chosen = pool.select(q)
    tokens, pull = pool(x, q)
    g = randn(*tokens.shape, seed=3)
    torch.autograd.backward([tokens, pull], [g, torch.tensor(0.7, dtype=DTYPE)])
    prompts, keys = torch.zeros_like(pool.prompts), torch.zeros_like(pool.keys)
    for n in range(2):
        for j in range(2):
            s = int(chosen[n, j])
            prompts[s] += g[n, 2 * j : 2 * j + 2]
            k, u = pool.keys.detach()[s], q.detach()[n] / q.detach()[n].norm()
            # d(1 - u'k/|k|)/dk
            keys[s] -= 0.7 / 2 * (u / k.norm() - (u @ k) * k / k.norm() ** 3)
    torch.testing.assert_close(pool.prompts.grad, prompts)
    torch.testing.assert_close(pool.keys.grad, keys)
    assert q.grad is None


def test_pull_brings_the_keys_to_the_query():
    pool, q = made(top_k=1), randn(1, 5)
    optimizer = torch.optim.SGD([pool.keys], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        pool(randn(1, 2, 4), q)[1].backward()
        optimizer.step()
    assert float(pool.distances(q).detach().min()) < 1e-6


def test_diversity_weighs_by_the_earlier_tasks_choices():
    pool, q = made(top_k=2, diversify=True), randn(4, 5)
    first = pool.select(q)
    pool(randn(4, 1, 4), q)
    assert torch.equal(pool.select(q), first)  # the running task's own choices do not count
    pool.after_task()
    assert pool.counts.sum() == 0 and pool.earlier.sum() == 8
    share = pool.earlier.to(DTYPE) / 8
    for n in range(4):
        known = [distance(q[n], k) * float(h) for k, h in zip(pool.keys.detach(), share, strict=True)]
        assert pool.select(q)[n].tolist() == sorted(range(6), key=known.__getitem__)[:2]
    assert not torch.equal(pool.select(q), first)
    pool.eval()
    assert torch.equal(pool.select(q), first)


def test_evaluation_counts_nothing_and_state_goes_round():
    pool, x, q = made(), randn(3, 7, 4), randn(3, 5)
    pool(x, q)
    pool.after_task()
    pool(x, q)
    other = made(generator=torch.Generator().manual_seed(9))
    assert not torch.equal(other.keys, pool.keys)
    other.load_state_dict(pool.state_dict())
    for p in (pool, other):
        p.eval()
    assert torch.equal(other(x, q)[0], pool(x, q)[0])
    assert torch.equal(other.counts, pool.counts) and torch.equal(other.earlier, pool.earlier)
    assert int(pool.counts.sum()) == 9
    assert torch.equal(made().prompts, made().prompts)


def test_edges():
    pool = made()
    tokens, pull = pool(torch.zeros(0, 3, 4, dtype=DTYPE), torch.zeros(0, 5, dtype=DTYPE))
    assert tokens.shape == (0, 9, 4) and pull == 0
    assert torch.equal(pool.distances(torch.zeros(1, 5, dtype=DTYPE)), torch.ones(1, 6, dtype=DTYPE))
    assert pool.select(torch.zeros(1, 5, dtype=DTYPE)).tolist() == [[0, 1, 2]]
    assert PromptPool(4, 1, 4)(torch.zeros(2, 3, 4, dtype=torch.bfloat16), torch.ones(2, 4))[0].dtype == torch.bfloat16


def test_misuse():
    for kwargs, match in (
        ({"top_k": 7}, "top_k is 7; expected 1 to pool_size, which is 6"),
        ({"query_features": 0}, "query_features is 0"),
    ):
        with pytest.raises(ValueError, match=match):
            made(**kwargs)
    with pytest.raises(TypeError, match=r"dtype is torch\.int64"):
        made(dtype=torch.int64)
    pool = made()
    with pytest.raises(ValueError, match="query has shape"):
        pool(randn(2, 3, 4), randn(2, 4))
    with pytest.raises(ValueError, match="embedded has shape"):
        pool(randn(2, 3, 5), randn(2, 5))
    with pytest.raises(ValueError, match="query is not finite"):
        pool(randn(1, 3, 4), torch.full((1, 5), math.nan, dtype=DTYPE))
    with pytest.raises(TypeError, match="expected a floating-point tensor"):
        pool.select(torch.ones(1, 5, dtype=torch.int64))
    assert pool.counts.sum() == 0
