"""The emulative predictor: a quantised shadow whose own routings are the forecast."""
