// Packs codes with the installed library, unpacks them, and reports whether they came back.
#include <ATen/ops/equal.h>
#include <ATen/ops/randint.h>
#include <gptq/pack_w4.h>

#include <cstdio>

int main() {
  const int64_t n = 17, k = 13;
  const at::Tensor codes = at::randint(16, {n, k}, at::kByte);
  const at::Tensor packed = gptq::pack_w4(codes);
  if (packed.sizes() != at::IntArrayRef({2, 2, 64}) || !at::equal(gptq::unpack_w4(packed, n, k), codes)) {
    std::fprintf(stderr, "unpack_w4(pack_w4(codes)) differs from codes\n");
    return 1;
  }
  std::puts("codes came back");
  return 0;
}
