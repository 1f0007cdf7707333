"""Into how many parts the heads of a model can be cut: among the processes of an engine, or ranks that share rows."""

from __future__ import annotations

from rlhf_dist.errors import ModelError


def require_head_parts(model: object, heads: int, kv_heads: int, parts: int, key: str) -> None:
    """Refuse a number of parts, that of the config's `key`, in which a model's heads do not come out. Pure.

    Fewer key-value heads than parts are held several times, each by as many. Raises ModelError.
    """
    right = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
    if parts not in right:
        raise ModelError(
            f"{model}: {key} is {parts}, and the model has {heads} attention heads and {kv_heads} key-value heads, "
            f"which cannot be shared out over so many; set {key} to one of {', '.join(map(str, right))}"
        )
