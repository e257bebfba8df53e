"""Memory and time forecast of a purification, counted on fake tensors before it is started."""
