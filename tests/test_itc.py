"""ITC against a plain float64 numpy version of the formula, written row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flip_jax.losses.itc import grouped_itc_loss, itc_loss

B, E, Q = 6, 16, 10


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make_case(seed=0, group=(1, 2, 3, 4, 5, 6), queue_group=None):
    rng = np.random.default_rng(seed)
    names = ("image", "text")
    return {
        "embeds": {n: unit(rng, B, E) for n in names},
        "twin_embeds": {n: unit(rng, B, E) for n in names},
        "queue": {n: unit(rng, Q, E) for n in names}
        | {"group": np.asarray(queue_group or [-100] * Q, np.int32)},
        "group": np.asarray(group, np.int32),
    }


def oracle(case, temperature, alpha, same_group):
    """Loss by loops in float64."""
    group, queue_group = case["group"], case["queue"]["group"]
    total = 0.0
    for query, key in (("image", "text"), ("text", "image")):
        candidates = np.concatenate([case["twin_embeds"][key], case["queue"][key]])
        candidate_group = np.concatenate([group, queue_group])
        for b in range(len(group)):
            used = [
                n
                for n in range(len(candidates))
                if n == b or same_group != "ignore" or candidate_group[n] != group[b]
            ]
            own = [n for n in used if n == b]
            if same_group == "positive":
                own = [n for n in used if candidate_group[n] == group[b]]
            student = np.array([case["embeds"][query][b] @ candidates[n] for n in used])
            teacher = np.array([case["twin_embeds"][query][b] @ candidates[n] for n in used])
            log_p = student / temperature - np.log(np.exp(student / temperature).sum())
            soft = np.exp(teacher / temperature) / np.exp(teacher / temperature).sum()
            for place, n in enumerate(used):
                target = alpha * soft[place] + (1 - alpha) * (n in own) / len(own)
                total -= target * log_p[place] / len(group) / 2
    return total


CASES = {
    "distinct": make_case(),
    "duplicates in the batch": make_case(1, (1, 1, 3, 4, 3, 3)),
    "duplicates in batch and queue": make_case(2, (1, 1, 3, 4, 5, 6), [1, 3, 3] + [-100] * 7),
    "one group only": make_case(3, (7,) * B, [7] * Q),
}


@pytest.mark.parametrize("same_group", ["negative", "ignore", "positive"])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_value(name, alpha, same_group):
    case = CASES[name]
    loss, _ = itc_loss(**case, temperature=0.07, alpha=alpha, same_group=same_group)
    expected = oracle(case, 0.07, alpha, same_group)
    np.testing.assert_allclose(loss, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("same_group", ["negative", "ignore", "positive"])
def test_gradient_is_the_central_difference(same_group):
    case = CASES["duplicates in batch and queue"]

    def loss(embeds, temperature):
        arguments = case | {"embeds": embeds}
        return itc_loss(**arguments, temperature=temperature, alpha=0.4, same_group=same_group)[0]

    grads, grad_t = jax.grad(loss, argnums=(0, 1))(case["embeds"], 0.2)
    h = 1e-6
    for name in ("image", "text"):
        for index in [(0, 0), (2, 7), (5, 15)]:
            moved = []
            for sign in (1, -1):
                embeds = {k: v.copy() for k, v in case["embeds"].items()}
                embeds[name][index] += sign * h
                moved.append(oracle(case | {"embeds": embeds}, 0.2, 0.4, same_group))
            expected = (moved[0] - moved[1]) / (2 * h)
            np.testing.assert_allclose(grads[name][index], expected, rtol=1e-4, atol=1e-6)

    # Teacher and student share the temperature, but only the student passes a gradient.
    def student_only(t):
        fixed = itc_loss(**case, temperature=0.2, alpha=0.4, same_group=same_group)[1]
        terms = []
        for d in ("i2t", "t2i"):
            logits = np.asarray(fixed[f"sim_{d}"], np.float64) * 0.2 / t
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            terms.append(-np.mean(np.sum(np.asarray(fixed[f"targets_{d}"]) * log_p, -1)))
        return np.mean(terms)

    if same_group != "ignore":  # an excluded logit is a constant, it does not scale with 1/t
        expected = (student_only(0.2 + 1e-5) - student_only(0.2 - 1e-5)) / 2e-5
        np.testing.assert_allclose(grad_t, expected, rtol=1e-4)


def test_no_gradient_into_twins_and_queue():
    case = CASES["distinct"]

    def loss(twins, queue):
        arguments = case | {"twin_embeds": twins, "queue": queue | {"group": case["group"][:0]}}
        arguments["queue"]["group"] = case["queue"]["group"]
        return itc_loss(**arguments, temperature=0.07, alpha=0.4)[0]

    queue = {n: case["queue"][n] for n in ("image", "text")}
    grads = jax.grad(loss, argnums=(0, 1))(case["twin_embeds"], queue)
    assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_finite_at_the_smallest_temperature():
    case = CASES["one group only"]
    for same_group in ("negative", "ignore", "positive"):
        value, grads = jax.value_and_grad(
            lambda e, s=same_group: itc_loss(
                **(case | {"embeds": e}), temperature=0.001, alpha=0.4, same_group=s
            )[0]
        )(case["embeds"])
        assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("local_batch", [1, 2, 3, 6])
def test_local_groups_are_separate_losses(local_batch):
    case = CASES["duplicates in batch and queue"]
    grouped, _ = grouped_itc_loss(**case, temperature=0.07, alpha=0.4, same_group="negative",
                                  local_batch=local_batch)  # fmt: skip
    parts = []
    for start in range(0, B, local_batch):
        rows = slice(start, start + local_batch)
        part = {
            "embeds": {k: v[rows] for k, v in case["embeds"].items()},
            "twin_embeds": {k: v[rows] for k, v in case["twin_embeds"].items()},
            "queue": case["queue"],
            "group": case["group"][rows],
        }
        parts.append(oracle(part, 0.07, 0.4, "negative"))
    np.testing.assert_allclose(grouped, np.mean(parts), rtol=2e-6)


def test_counts_candidates_of_the_same_group():
    case = make_case(2, (1, 1, 3, 4, 5, 6), [1, 3, 3] + [-100] * 7)
    _, aux = itc_loss(**case, temperature=jnp.float32(0.07), alpha=0.4)
    # Rows 0 and 1 see each other and one queue entry, row 2 sees two queue entries.
    assert float(aux["same_group"]) == pytest.approx((2 + 2 + 2) / B)
