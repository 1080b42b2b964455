"""The timing model behind `odmoe plan`: pure functions of a model's shape and a description of machines."""
