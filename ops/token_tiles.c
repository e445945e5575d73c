// Tiles of tokens over threads. Many tiles: a thread takes whole ones. Few: the threads share each of them.
#include "product.h"

typedef struct tiling {
    rbe_job *job;
    int64_t width;
    rbe_tile_body tile;
    const void *pass;
} tiling;

static void tiles_of_thread(int64_t begin, int64_t end, void *context) {
    const tiling *s = context;
    for (int64_t i = begin; i < end; ++i)
        if (!s->tile(s->pass, i * s->width, NULL)) atomic_store(&s->job->failed, true);
}

rbe_status rbe_run_token_tiles(rbe_job *job, int64_t width, rbe_tile_body tile, const void *pass, rbe_error *err) {
    const int64_t count = (job->x->rows + width - 1) / width;
    const int shares = rbe_thread_count(job->threads);
    tiling s = {job, width, tile, pass};
    if (shares > 1 && count < 2 * shares) {
        for (int64_t i = 0; i < count; ++i)
            if (!tile(pass, i * width, job->threads)) atomic_store(&job->failed, true);
    } else {
        rbe_run(job->threads, count, 1, tiles_of_thread, &s);
    }
    return atomic_load(&job->failed) ? rbe_out_of_memory(err) : RBE_OK;
}

void rbe_finish_tile(const rbe_job *job, int64_t t0, int64_t tokens, int64_t first, int64_t rows, float *sums, int64_t width) {
    for (int64_t r = 0; r < rows; ++r) {
        const float gain = ((const float *)job->w->gain)[first + r], bias = job->bias ? job->bias[first + r] : 0.0f;
        for (int64_t t = 0; t < width; ++t) sums[r * width + t] = sums[r * width + t] * gain + bias;
    }
    for (int64_t t = 0; t < tokens; t += RBE_TILE_MAX)
        rbe_store_tile(job->kernels, job->y, t0 + t, rbe_min(RBE_TILE_MAX, tokens - t), first, rows, sums + t, width);
}
