#include "quant/pull_bf16_kernel.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

#include "quant/pull_tile.h"
#endif

namespace gptq {
namespace {

#ifdef __AVX512BF16__
struct Tile : TileShape<64, 4, kTileColumns> {
  static GPTQ_INLINE void multiply_add(Lanes<64, float>& sum, const Lanes<64, Bf16Pair>& column, Bf16Pair m) {
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(column),
                           reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(m))));
  }
};
#endif

}  // namespace

#ifdef __AVX512BF16__
const PullBf16 kPullBf16 = pull_all<Tile, Bf16Pair, float>;
#else
const PullBf16 kPullBf16 = nullptr;
#endif

}  // namespace gptq
