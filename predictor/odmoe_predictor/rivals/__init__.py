"""Predictors other than the shadow, behind one interface: what people compare it with."""
