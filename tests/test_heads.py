"""Dense heads: every piece against PyTorch, and what no other code can check."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flip_jax import partition
from flip_jax.config import MeshConfig, VisionConfig
from flip_jax.models import heads
from flip_jax.models.position_table import resize_position_table
from flip_jax.models.vit import VisionTransformer

WIDTH, CHANNELS, CLASSES = 6, 4, 5


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pyramid_input(rows=4, side=6):
    return [draw(rows, side, side, WIDTH, seed=n) for n in range(4)]


def make_head(output=heads.SegmentationHead, count=CLASSES):
    def build():
        return heads.DenseHead(
            WIDTH, CHANNELS, lambda c, r: output(c, count, r), nnx.Rngs(jax.random.key(1))
        )

    graphdef, params, stats = nnx.split(build(), nnx.Param, nnx.BatchStat)
    # Values that make every array matter.
    rng = np.random.default_rng(5)
    params = jax.tree.map(
        lambda p: rng.normal(0, 0.5, p.shape).astype(np.float32), nnx.to_pure_dict(params)
    )
    stats = jax.tree.map(
        lambda s: rng.uniform(0.5, 1.5, s.shape).astype(np.float32), nnx.to_pure_dict(stats)
    )
    return graphdef, params, stats


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="the oracle needs PyTorch (extra `torch`)")


def nchw(torch, x):
    return torch.tensor(np.array(x, np.float64)).permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1).detach().numpy()


class Peer:
    """The head in float64 PyTorch functions, written from the papers, reading our arrays."""

    def __init__(self, torch, params, stats, train):
        self.torch, self.f, self.train = torch, torch.nn.functional, train
        self.params = jax.tree.map(
            lambda p: torch.tensor(np.array(p, np.float64), requires_grad=True), params
        )
        self.stats = jax.tree.map(lambda s: torch.tensor(np.array(s, np.float64)), stats)

    def norm(self, x, params, stats):
        return self.f.batch_norm(
            x, stats["mean"], stats["var"], params["scale"], params["bias"], self.train, 0.1, 1e-5
        )

    def up(self, x, params):
        # torch's kernel is [in, out, y, x].
        kernel = params["kernel"].permute(2, 3, 0, 1)
        return self.f.conv_transpose2d(x, kernel, params["bias"], stride=2)

    def conv(self, x, params, stats):
        kernel = params["kernel"].permute(3, 2, 0, 1)
        x = self.f.conv2d(x, kernel, padding=kernel.shape[-1] // 2)
        return self.f.relu(self.norm(x, params["norm"], stats["norm"]))

    def resize(self, x, size):
        return self.f.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)

    def neck(self, features):
        params, stats = self.params["neck"], self.stats["neck"]
        x = self.norm(
            self.up(features[0], params["up4_first"]), params["up4_norm"], stats["up4_norm"]
        )
        x = self.up(self.f.gelu(x), params["up4_second"])
        return [
            x,
            self.up(features[1], params["up2"]),
            features[2],
            self.f.max_pool2d(features[3], 2),
        ]

    def decoder(self, maps):
        params, stats = self.params["decoder"], self.stats["decoder"]
        last = maps[-1]
        pooled = [last]
        for n in (1, 2, 3, 6):
            part = params["pooled"][f"side_{n}"], stats["pooled"][f"side_{n}"]
            small = self.conv(self.f.adaptive_avg_pool2d(last, n), *part)
            pooled.append(self.resize(small, last.shape[2:]))
        top = self.conv(self.torch.cat(pooled, 1), params["context"], stats["context"])
        names = [f"level_{n}" for n in range(3)]
        levels = [
            self.conv(x, params["lateral"][n], stats["lateral"][n])
            for n, x in zip(names, maps, strict=False)
        ] + [top]
        for n in (2, 1, 0):
            levels[n] = levels[n] + self.resize(levels[n + 1], levels[n].shape[2:])
        smooth = [
            self.conv(x, params["smooth"][n], stats["smooth"][n])
            for n, x in zip(names, levels, strict=False)
        ] + [top]
        size = smooth[0].shape[2:]
        fused = self.torch.cat([self.resize(x, size) for x in smooth], 1)
        return self.conv(fused, params["fuse"], stats["fuse"])

    def __call__(self, features):
        x = self.decoder(self.neck([nchw(self.torch, x) for x in features]))
        kernel = self.params["output"]["kernel"].T[:, :, None, None]
        return self.f.conv2d(x, kernel, self.params["output"]["bias"])


@pytest.mark.parametrize("train", [True, False])
def test_the_whole_head_against_torch(torch, train):
    """Output, every gradient and the running statistics."""
    graphdef, params, stats = make_head()
    features = pyramid_input()
    weights = draw(4, 24, 24, CLASSES, seed=9)

    @jax.jit
    def run(params, stats):
        def loss(params):
            head = nnx.merge(graphdef, params, stats)
            out = head(features, train)
            return jnp.mean(out * weights), (out, nnx.to_pure_dict(nnx.state(head, nnx.BatchStat)))

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, (out, new_stats)), grads = run(params, stats)
    peer = Peer(torch, params, stats, train)
    found = peer(features)
    (found * nchw(torch, weights)).mean().backward()
    np.testing.assert_allclose(out, nhwc(found), atol=2e-5)
    wanted = jax.tree.map(lambda p: p.grad.numpy(), peer.params)
    for (path, mine), theirs in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=1e-6, rtol=2e-4, err_msg=str(path))
    assert max(np.abs(g).max() for g in jax.tree.leaves(grads)) > 1e-3
    for mine, theirs in zip(jax.tree.leaves(new_stats), jax.tree.leaves(peer.stats), strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), atol=1e-5)
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (new_stats, stats)), strict=True)
    ]
    assert all(changed) if train else not any(changed)


@pytest.mark.parametrize(("old", "new"), [((5, 7), (11, 9)), ((3, 3), (6, 6)), ((8, 8), (5, 6))])
def test_resize_against_torch(torch, old, new):
    x = draw(2, *old, 3)
    wanted = torch.nn.functional.interpolate(
        nchw(torch, x), size=new, mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(heads.resize_map(x, *new), nhwc(wanted), atol=1e-6)


@pytest.mark.parametrize("side", [1, 2, 3, 6])
def test_pooling_against_torch(torch, side):
    x = draw(2, 7, 4, 3)
    wanted = torch.nn.functional.adaptive_avg_pool2d(nchw(torch, x), side)
    np.testing.assert_allclose(heads.pool_map(x, side), nhwc(wanted), atol=1e-6)


def test_sizes_of_the_pyramid():
    neck = heads.DenseNeck(WIDTH, nnx.Rngs(0))
    maps = neck(pyramid_input(rows=1, side=5), train=False)
    assert [m.shape for m in maps] == [(1, s, s, WIDTH) for s in (20, 10, 5, 2)]


def test_batch_norm_is_of_the_whole_batch_on_any_mesh():
    """Rows cut over 8 devices: the statistics, and with them the output, are those of one."""
    x = draw(8, 3, 3, 4)

    @jax.jit
    def run(x):
        norm = heads.BatchNorm(4)
        return norm(x, train=True), norm.mean[...], norm.var[...]

    alone = run(x)
    mesh = partition.make_mesh(MeshConfig())
    assert mesh.size == 8
    cut = run(jax.device_put(x, NamedSharding(mesh, P(mesh.axis_names))))
    for mine, theirs in zip(cut, alone, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    flat = x.reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(alone[1], 0.1 * flat.mean(0), atol=1e-6)
    np.testing.assert_allclose(alone[2], 0.9 + 0.1 * flat.var(0, ddof=1), atol=1e-6)


def test_dropout_drops_channels_of_a_picture():
    head = heads.SegmentationHead(64, 64, nnx.Rngs(0))
    head.kernel[...] = jnp.eye(64)
    x = jnp.ones((8, 3, 3, 64))
    assert np.array_equal(head(x), x)
    out = np.asarray(head(x, jax.random.key(3)))
    assert np.all(out == out[:, :1, :1])
    assert set(np.unique(out).tolist()) == {0.0, np.float32(1 / 0.9)}
    assert 0.05 < (out[:, 0, 0] == 0).mean() < 0.15
    assert not np.array_equal(out[0], out[1])


def test_heatmaps_have_their_side():
    head = heads.HeatmapHead(CHANNELS, 3, nnx.Rngs(0), side=20)
    head.kernel[...] = jnp.asarray(draw(CHANNELS, 3))
    x = draw(2, 8, 8, CHANNELS)
    wanted = heads.resize_map(x @ draw(CHANNELS, 3), 20, 20)
    np.testing.assert_allclose(head(x), wanted, atol=1e-6)


def test_blocks():
    """4, 6, 8 and 12 of 12 are FaRL's."""
    found = {depth: heads.dense_blocks(depth) for depth in (12, 24, 4, 2, 1)}
    assert found[12] == (4, 6, 8, 12) and found[24] == (8, 12, 16, 24)
    assert found[4] == (1, 2, 3, 4) and found[2] == (1, 1, 1, 2) and found[1] == (1, 1, 1, 1)


def test_features_are_block_outputs_at_their_place():
    """At twice the size: the tower run block by block in the order of the patches."""
    cfg = VisionConfig(image_size=16, patch_size=8, width=8, depth=4, heads=2, mlp_width=16)
    vit = VisionTransformer(cfg, dtype=jnp.float32, remat="none", rngs=nnx.Rngs(3))
    table = resize_position_table(np.asarray(vit.position_embed[...]), 4)
    assert table.shape == (17, 8)
    vit.position_embed = nnx.Param(jnp.asarray(table))
    image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    found = heads.dense_features(vit, image, (1, 2, 4))
    tokens, outputs = vit(heads.pixels_of(image), return_blocks=True)
    assert [f.shape for f in found] == [(2, 4, 4, 8)] * 3
    for f, block in zip(found, (1, 2, 4), strict=True):
        for y, x in ((0, 0), (1, 3), (3, 2)):
            np.testing.assert_array_equal(f[:, y, x], outputs[block - 1, :, 1 + 4 * y + x])
    np.testing.assert_allclose(vit.post_norm(outputs[-1]), tokens, atol=1e-6)
