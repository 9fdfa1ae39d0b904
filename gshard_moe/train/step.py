"""One optimiser step, and one evaluation step.

B sequences of a step, L tokens, A micro-batches.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int32

from gshard_moe.train.state import Model, TrainState, optimizer, schedule, state_shardings


class StepMetrics(NamedTuple):
    """What one step did: scalars, float32.

    Attributes:
      loss: cross-entropy, nats per token, mean over the step.
      total_loss: with the weighted router losses; what the gradient is of.
      aux_loss, z_loss: unweighted, mean over MoE layers; 0 for a dense model.
      dropped: share of choices that found no slot, mean over MoE layers.
      load_max_over_mean: load of the busiest expert over the mean load, mean over MoE layers.
      grad_norm: global, before clipping.
      lr: the learning rate of this step.
      skipped: steps skipped so far.
      finite: whether loss and gradient were finite; if not, the weights were left as they were.
    """

    loss: Float[Array, ""]
    total_loss: Float[Array, ""]
    aux_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    dropped: Float[Array, ""]
    load_max_over_mean: Float[Array, ""]
    grad_norm: Float[Array, ""]
    lr: Float[Array, ""]
    skipped: Int32[Array, ""]
    finite: Bool[Array, ""]


class LossParts(NamedTuple):
    """What the loss is made of."""

    loss: Float[Array, ""]
    aux_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    dropped: Float[Array, ""]
    load_max_over_mean: Float[Array, ""]


def loss_fn(
    params: dict[str, Any],
    model: Model,
    inputs_BL: Int32[Array, "B L"],
    targets_BL: Int32[Array, "B L"],
) -> tuple[Float[Array, ""], LossParts]:
    """Returns the training loss and its parts."""
    output = model.merge(params)(inputs_BL, capacity="train")
    with jax.named_scope("loss"):
        nats_BL = optax.softmax_cross_entropy_with_integer_labels(output.logits_BLV, targets_BL)
        loss, zero = nats_BL.mean(), jnp.zeros(())
        if output.metrics is None:
            return loss, LossParts(loss, zero, zero, zero, jnp.ones(()))
        moe, metrics = model.config.moe, output.metrics
        assert moe is not None
        spread = metrics.load_E.max(axis=-1) / metrics.load_E.mean(axis=-1).clip(min=1.0)
        parts = LossParts(
            loss,
            metrics.aux_loss.mean(),
            metrics.z_loss.mean(),
            metrics.dropped.mean(),
            spread.mean(),
        )
        total = loss + moe.aux_loss_weight * parts.aux_loss + moe.z_loss_weight * parts.z_loss
        return total, parts


def train_step(
    state: TrainState, inputs_BL: Int32[Array, "B L"], targets_BL: Int32[Array, "B L"], model: Model
) -> tuple[TrainState, StepMetrics]:
    """Takes one step of AdamW on the mean gradient of the batch.

    A step whose loss or gradient is not finite changes nothing but the counters.
    """
    train = model.config.train
    params = _as_stored(state.params, model)
    (total, parts), grads = _gradients(params, inputs_BL, targets_BL, model)
    with jax.named_scope("optimizer"):
        grads = _constrain(grads, model, "optimizer")
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        updates, opt_state = optimizer(model).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
    skipped = state.skipped + (~finite).astype(jnp.int32)
    lr = jnp.asarray(schedule(train)(state.step - state.skipped), jnp.float32)
    metrics = StepMetrics(
        total_loss=total, grad_norm=norm, lr=lr, skipped=skipped, finite=finite, **parts._asdict()
    )
    return TrainState(params, opt_state, state.step + 1, skipped, state.key), metrics


def jit_train_step(model: Model) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Compiles `train_step` for the model's layout; the state's buffers are reused."""
    step = functools.partial(train_step, model=model)
    if model.layout is None:
        return jax.jit(step, donate_argnums=0)
    state = state_shardings(model)
    tokens = model.layout.sharding("token_ids")
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(state, tokens, tokens),
        out_shardings=(state, state.step),
    )


def eval_sums(
    params: dict[str, Any],
    inputs_BL: Int32[Array, "B L"],
    targets_BL: Int32[Array, "B L"],
    mask_BL: Bool[Array, "B L"],
    model: Model,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the summed cross-entropy in nats and the number of targets that count."""
    output = model.merge(params)(inputs_BL, mask_BL=mask_BL, capacity="eval")
    nats_BL = optax.softmax_cross_entropy_with_integer_labels(output.logits_BLV, targets_BL)
    weight_BL = mask_BL.astype(jnp.float32)
    return (nats_BL * weight_BL).sum(), weight_BL.sum()


def _gradients(
    params: dict[str, Any], inputs_BL: jax.Array, targets_BL: jax.Array, model: Model
) -> tuple[tuple[jax.Array, LossParts], dict[str, Any]]:
    """Returns the mean loss and gradient over the micro-batches."""
    accumulate = model.config.train.accumulate
    grad = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate == 1:
        return grad(params, model, inputs_BL, targets_BL)

    def split(x_BL: jax.Array) -> jax.Array:
        # Every A-th row, so that each micro-batch is spread over the devices as the batch is.
        x_BAL = x_BL.reshape(-1, accumulate, x_BL.shape[-1])
        return x_BAL.swapaxes(0, 1)

    def add(total: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        part = grad(params, model, *batch)
        return jax.tree.map(jnp.add, total, part), None

    shapes = jax.eval_shape(lambda p, x, y: grad(p, model, x, y), params, inputs_BL, targets_BL)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, (split(inputs_BL), split(targets_BL)))
    return jax.tree.map(lambda leaf: leaf / accumulate, total)


def _as_stored(params: dict[str, Any], model: Model) -> dict[str, Any]:
    """Brings the master weights from the optimiser's layout to the stored one (ZeRO-1)."""
    if model.layout is None or not model.layout.config.layout.optimizer:
        return params
    return _constrain(params, model, "stored")


def _constrain(tree: dict[str, Any], model: Model, stage: Any) -> dict[str, Any]:
    layout = model.layout
    if layout is None:
        return tree
    return jax.tree.map(lambda leaf, role: layout.constrain(role, leaf, stage), tree, model.roles)
