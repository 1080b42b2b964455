"""The OpenAI dialect: schemas, errors, and how a generation is written as a body or a stream."""
