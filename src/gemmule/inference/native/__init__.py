"""One decoding step in C for the CPU: `step.c`, its library, its ctypes binding and the decoder that calls it."""
