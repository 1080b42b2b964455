"""The Anthropic Messages API: its shapes, its errors and its events, in front of the same generations as OpenAI's."""
