/* Drawing the next token: the engine's sample.c, in a translation unit of its own. */

#ifndef DRAW_H
#define DRAW_H
#include <stdint.h>

typedef struct {
    double temperature, top_p, min_p;
    int64_t top_k;
} Sampling;

/* Bytes of workspace that `draw_token` needs for a vocabulary. */
int64_t draw_bytes(int64_t vocabulary);
/* The next token from logits (vocabulary,) and a number in [0, 1); below 0 where the logits are not finite. */
int64_t draw_token(const float *logits, int64_t vocabulary, const Sampling *sampling, double uniform, char *workspace);
#endif
