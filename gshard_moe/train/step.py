"""One optimiser step, and one evaluation step.

B sequences of a step, L tokens, A micro-batches.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int32, Key

from gshard_moe import aot
from gshard_moe.train.state import Model, TrainState, optimizer, schedule, state_shardings


class StepMetrics(NamedTuple):
    """What one step did: scalars, float32.

    Attributes:
      loss: cross-entropy, nats per token, mean over the step.
      total_loss: with the weighted router losses; what the gradient is of.
      aux_loss, z_loss: unweighted, mean over MoE layers; 0 for a dense model.
      dropped: share of choices that found no slot, mean over MoE layers.
      load_max_over_mean: load of the busiest expert over the mean load, mean over MoE layers.
      unused: experts without a token, mean over MoE layers.
      entropy: of the router, nats, mean over tokens and MoE layers; log E is undecided.
      confidence: the router's largest probability, mean over tokens and MoE layers.
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
    unused: Float[Array, ""]
    entropy: Float[Array, ""]
    confidence: Float[Array, ""]
    grad_norm: Float[Array, ""]
    lr: Float[Array, ""]
    skipped: Int32[Array, ""]
    finite: Bool[Array, ""]


class LossParts(NamedTuple):
    """What the loss is made of, and how many choices fell on each expert of each MoE layer."""

    loss: Float[Array, ""]
    aux_loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    dropped: Float[Array, ""]
    load_max_over_mean: Float[Array, ""]
    unused: Float[Array, ""]
    entropy: Float[Array, ""]
    confidence: Float[Array, ""]
    chosen_LE: Float[Array, "layers E"]


def loss_fn(
    params: dict[str, Any],
    model: Model,
    inputs_BL: Int32[Array, "B L"],
    targets_BL: Int32[Array, "B L"],
    *,
    biases: dict[str, Any] | None = None,
    key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, ""], LossParts]:
    """Returns the training loss and its parts; `key` is needed where the card is random."""
    output = model.merge(params, biases)(inputs_BL, key=key, capacity="train")
    with jax.named_scope("loss"):
        nats_BL = optax.softmax_cross_entropy_with_integer_labels(output.logits_BLV, targets_BL)
        loss, zero = nats_BL.mean(), jnp.zeros(())
        if output.metrics is None:
            none = dict.fromkeys(LossParts._fields, zero) | {
                "loss": loss,
                "load_max_over_mean": jnp.ones(()),
                "chosen_LE": jnp.zeros((0, 0)),
            }
            return loss, LossParts(**none)
        moe, metrics = model.config.moe, output.metrics
        assert moe is not None
        means = {
            name: getattr(metrics, name).mean()
            for name in LossParts._fields
            if name in metrics._fields
        }
        parts = LossParts(loss=loss, chosen_LE=metrics.chosen_E, **means)
        return loss + metrics.weighted_loss(moe), parts


def train_step(
    state: TrainState, inputs_BL: Int32[Array, "B L"], targets_BL: Int32[Array, "B L"], model: Model
) -> tuple[TrainState, StepMetrics]:
    """Takes one step of AdamW on the mean gradient of the batch.

    A step whose loss or gradient is not finite changes nothing but the counters.
    """
    train = model.config.train
    params = _as_stored(state.params, model)
    (total, parts), grads = _gradients(params, state, inputs_BL, targets_BL, model)
    with jax.named_scope("optimizer"):
        grads = _constrain(grads, model, "optimizer")
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        updates, opt_state = optimizer(model).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        parts = parts._asdict()
        biases = model.moved_biases(state.biases, parts.pop("chosen_LE"))
        params, biases, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, biases, opt_state),
            (state.params, state.biases, state.opt_state),
        )
    skipped = state.skipped + (~finite).astype(jnp.int32)
    lr = jnp.asarray(schedule(train)(state.step - state.skipped), jnp.float32)
    metrics = StepMetrics(
        total_loss=total, grad_norm=norm, lr=lr, skipped=skipped, finite=finite, **parts
    )
    return TrainState(params, biases, opt_state, state.step + 1, skipped, state.key), metrics


def jit_train_step(model: Model) -> aot.JitWithOptions:
    """Compiles `train_step` for the model's layout and chips; the state's buffers are reused."""
    step = functools.partial(train_step, model=model)
    if model.layout is None:
        return aot.jit(step, jax.devices(), donate_argnums=0)
    state = state_shardings(model)
    tokens = model.layout.sharding("token_ids")
    mesh = model.layout.mesh()
    assert isinstance(mesh, jax.sharding.Mesh), "an abstract mesh runs nothing"
    return aot.jit(
        step,
        mesh.devices.flat,
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
    biases: dict[str, Any] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the summed cross-entropy in nats and the number of targets that count."""
    output = model.merge(params, biases)(inputs_BL, mask_BL=mask_BL, capacity="eval")
    nats_BL = optax.softmax_cross_entropy_with_integer_labels(output.logits_BLV, targets_BL)
    weight_BL = mask_BL.astype(jnp.float32)
    return (nats_BL * weight_BL).sum(), weight_BL.sum()


def _gradients(
    params: dict[str, Any],
    state: TrainState,
    inputs_BL: jax.Array,
    targets_BL: jax.Array,
    model: Model,
) -> tuple[tuple[jax.Array, LossParts], dict[str, Any]]:
    """Returns the mean loss and gradient over the micro-batches."""
    accumulate = model.config.train.accumulate
    step_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

    def grad(index: jax.Array | int, inputs_BL: jax.Array, targets_BL: jax.Array) -> Any:
        key = jax.random.fold_in(step_key, index)
        of_params = jax.value_and_grad(loss_fn, has_aux=True)
        return of_params(params, model, inputs_BL, targets_BL, biases=state.biases, key=key)

    if accumulate == 1:
        return grad(0, inputs_BL, targets_BL)

    def split(x_BL: jax.Array) -> jax.Array:
        # Every A-th row, so that each micro-batch is spread over the devices as the batch is.
        x_BAL = x_BL.reshape(-1, accumulate, x_BL.shape[-1])
        return x_BAL.swapaxes(0, 1)

    def add(total: Any, batch: tuple[jax.Array, ...]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, grad(*batch)), None

    batches = (jnp.arange(accumulate), split(inputs_BL), split(targets_BL))
    shapes = jax.eval_shape(grad, *jax.tree.map(lambda x: x[0], batches))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, batches)
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
