"""The MoE layer whose experts live on other machines."""
