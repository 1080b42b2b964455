"""`odmoe bench importance`: what substitution, score-aware slots, prefetch and the CPU's share bring, and cost."""
