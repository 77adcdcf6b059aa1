// fp4moe.Activation.combine of float32 sums; source.py defines ACTIVATION, ALPHA, BETA and LIMIT.

enum { IDENTITY, SILU, GELU_TANH, GELU, RELU2, RELU, SILU_STEP, SILU_SOFTCAP };

// 1 / (1 + e^-x), with an error of a few units in the last place.
__device__ __forceinline__ float sigmoid(float x) {
  float power, share;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-1.4426950408889634f * x));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(share) : "f"(1.0f + power));
  return share;
}

// NaN stays NaN.
__device__ __forceinline__ float largest(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

__device__ __forceinline__ float smallest(float x, float y) { return -largest(-x, -y); }

__device__ __forceinline__ float within(float x) { return largest(smallest(x, LIMIT), -LIMIT); }

template <int NAME>
__device__ __forceinline__ float activate(float x) {
  if (NAME == SILU) return x * sigmoid(ALPHA * x);
  // (1 + tanh(z)) / 2 = sigmoid(2 z)
  if (NAME == GELU_TANH) return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
  if (NAME == GELU) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
  if (NAME == RELU2 || NAME == RELU) x = largest(x, 0.0f);
  return NAME == RELU2 ? x * x : x;
}

__device__ __forceinline__ float combine(float up, float gate) {
  if (!GATED) return activate<ACTIVATION>(up);
  if (ACTIVATION == SILU_SOFTCAP) {
    return ALPHA * tanhf(gate / ALPHA) * sigmoid(gate) * (BETA * tanhf(up / BETA));
  }
  if (ACTIVATION == SILU_STEP) return smallest(gate * sigmoid(gate), LIMIT) * within(up);
  if (LIMIT > 0) {
    gate = smallest(gate, LIMIT);
    up = within(up);
  }
  return activate<ACTIVATION>(gate) * (BETA != 0 ? up + BETA : up);
}
