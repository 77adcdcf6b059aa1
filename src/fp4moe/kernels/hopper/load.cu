// The group of warps that loads: weights by bulk copies, tokens gathered by 16 bytes.

// What a thread of the loading group copies of an item.
struct Copies {
  static constexpr int LINES = (SLOTS + 15) / 16;
  const char* tokens[LINES];
  u32 there = 0;  // a bit for each line that holds a slot
  // A few lanes of each warp have a copy of words, or of scales.
  const unsigned char* weights = nullptr;
  u32 target = 0, bytes = 0, total = 0;

  __device__ __forceinline__ Copies(const Arguments& a, const Work& work, u32 shared) {
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
#pragma unroll
    for (int i = 0; i < LINES; ++i) {
      const int place = thread / 8 + 16 * i;
      long long row = 0;
      if (place < work.used) {
        there |= 1 << i;
        row = __ldg(a.order + (long long)work.number * SLOTS + place);
        if (GATE_UP) row = (int)row / a.top_k;
      }
      tokens[i] = (const char*)(a.tokens + row * a.token_stride + thread % 8 * 8);
    }
    if (lane < GROUPS) {
      const int copy = lane * 2 + warp % 2;
      const bool scale = warp >= 2;
      const int tile = row_tile(a, work.block, copy / 2, copy % 2);
      if (tile >= 0 && (!scale || SCALE_BYTES > 0)) {
        bytes = scale ? TILE_SCALES : TILE_WORDS;
        const long long first =
            ((long long)work.expert * (PARTS * a.rows / 64) + tile) * a.slabs * bytes;
        weights = (scale ? a.scales : a.words) + first;
        target = shared + WEIGHTS_AT + (scale ? GROUPS * 2 * TILE_WORDS : 0) + copy * bytes;
      }
    }
    for (int copy = 0; copy < GROUPS * 2; ++copy) {
      if (row_tile(a, work.block, copy / 2, copy % 2) >= 0) total += TILE_WORDS + TILE_SCALES;
    }
  }

  // Begin a stage: slab + SLAB of the item.
  template <int SLAB>
  __device__ __forceinline__ void begin(const Arguments& a, u32 shared, int slab, Stage& stage) {
    const int thread = threadIdx.x % 128, chunk = thread % 8, line = thread / 8;
    const u32 ready = shared + BARRIERS_AT + 8 * stage.index;
    barrier_wait(ready + 8 * STAGES, stage.parity ^ 1);
    if (thread == 0) barrier_expect(ready, total);
    if (bytes) {
      bulk_load(target + stage.index * WEIGHT_BYTES, weights, bytes, ready);
      weights += bytes;
    }
    // Row 8 i + r of tokens has its 16-byte chunks at places chunk ^ r.
    const u32 to =
        shared + stage.index * TOKEN_BYTES + line * 128 + ((chunk ^ (line & 7)) << 4);
    const u32 present = (slab + SLAB) * 64 + chunk * 8 < a.columns ? 16 : 0;
#pragma unroll
    for (int i = 0; i < LINES; ++i) {
      if (there >> i & 1) copy_chunk<128 * SLAB>(to + 2048 * i, tokens[i], present);
    }
    copies_arrive(ready);
    stage.next();
  }
};

__device__ __forceinline__ void load_all(const Arguments& a, u32 shared, int blocks, int items) {
  Stage stage;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    Copies copies(a, Work(a, item, blocks), shared);
    for (int slab = 0; slab < a.slabs; slab += 4) {
      copies.begin<0>(a, shared, slab, stage);
      if (slab + 1 < a.slabs) copies.begin<1>(a, shared, slab, stage);
      if (slab + 2 < a.slabs) copies.begin<2>(a, shared, slab, stage);
      if (slab + 3 < a.slabs) copies.begin<3>(a, shared, slab, stage);
#pragma unroll
      for (int i = 0; i < Copies::LINES; ++i) copies.tokens[i] += 4 * 128;
    }
  }
}
