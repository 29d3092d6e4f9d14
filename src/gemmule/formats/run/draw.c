/* Drawing the next token: the engine's sample.c, in a translation unit of its own. */

#include "draw.h"
#include "sample.c"

int64_t draw_bytes(int64_t vocabulary) { return workspace_bytes(vocabulary, 1); }

int64_t draw_token(const float *logits, int64_t vocabulary, const Sampling *sampling, double uniform, char *workspace) {
    Settings settings = {
        .temperature = sampling->temperature,
        .top_p = sampling->top_p,
        .min_p = sampling->min_p,
        .repetition = 1,
        .top_k = sampling->top_k,
    };
    Row row = {.settings = &settings, .uniform = uniform};
    int64_t drawn;
    draw_rows(logits, vocabulary, vocabulary, &row, 1, &drawn, workspace, 1);
    return drawn;
}
