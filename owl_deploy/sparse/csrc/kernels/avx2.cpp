#include "kernels/isa_avx2.h"
#include "kernels/product.h"

namespace owl {

extern const Kernels kAvx2Kernels;
constexpr Kernels kAvx2Kernels = kernels_of<Avx2>(Formats{});

}  // namespace owl
