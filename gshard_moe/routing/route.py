"""One door to every router: the config says which.

G groups, S tokens, E experts.
"""

from jaxtyping import Array, Bool, Float, Int, Key

from gshard_moe import config
from gshard_moe.routing.contract import Routing
from gshard_moe.routing.gshard import gshard
from gshard_moe.routing.hashed import hashed
from gshard_moe.routing.logits import noisy
from gshard_moe.routing.top_k import top_k


def route(
    logits_GSE: Float[Array, "G S E"],
    moe: config.MoEConfig,
    *,
    key_G: Key[Array, " G"] | None = None,
    mask_GS: Bool[Array, "G S"] | None = None,
    selection_bias_E: Float[Array, " E"] | None = None,
    token_ids_GS: Int[Array, "G S"] | None = None,
    run: int | None = None,
) -> Routing:
    """Routes tokens to experts by `moe.router`; all but `expert_choice`, which makes `Slots`.

    Args:
      logits_GSE: float32, without the noise that is added to logits.
      moe: what is computed.
      key_G: a key for each group; None: there is no noise, and every second expert is taken.
      mask_GS: False for padding; its logits must be finite, or its gradients are not.
      selection_bias_E: of DeepSeek's router.
      token_ids_GS: of the hash router.
      run: tokens of a run of the statistics; default: the group.
    Raises:
      ValueError: if the hash router is given no token ids.
    """
    if moe.router == "hash":
        if token_ids_GS is None:
            raise ValueError("token_ids_BL: must be given to the router hash; got None")
        return hashed(token_ids_GS, moe, mask_GS=mask_GS, run=run)
    clean_GSE = None
    if key_G is not None and moe.noise.startswith("logits"):
        clean_GSE = logits_GSE if moe.noise == "logits_normal" else None
        logits_GSE = noisy(logits_GSE, key_G, moe)
    if moe.router in ("gshard_paper", "gshard_praxis"):
        return gshard(logits_GSE, moe, key_G=key_G, mask_GS=mask_GS, run=run)
    assert moe.router == "top_k", moe.router
    return top_k(
        logits_GSE,
        moe,
        mask_GS=mask_GS,
        selection_bias_E=selection_bias_E,
        clean_logits_GSE=clean_GSE,
        run=run,
    )
