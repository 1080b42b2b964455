"""How far the experts of one request may be replaced: its own wish, the server's, and the operator's cap. Pure."""


def effective_alpha(asked: float | None, *, default: float, cap: float) -> float:
    """The smaller of the cap and what the request asks for, or the server's default if it asks for nothing. Raises
    ValueError for what cannot be asked for."""
    if asked is not None and not 0 <= asked <= 1:
        raise ValueError(f"expert_substitution must be between 0 and 1, not {asked}")
    return min(default if asked is None else asked, cap)
