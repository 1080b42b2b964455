"""The contract between the roles: messages, codec, links, placement. Knows no tensors library and no role."""
