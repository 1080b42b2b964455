"""Importance mode (SMoE): which experts may stand in for others, which leave their slots, which are fetched early."""
