// The correct sample kernels.
#include "kernels/attention.cuh"
#include "kernels/exchange.cuh"
#include "kernels/pitfalls.cuh"
#include "kernels/rings.cuh"
#include "kernels/tiles.cuh"

namespace fastgen::kernels {
namespace {

const Register kReverse("reverse", reverse::kernel<reverse::kNone>);
const Register kExchange("exchange", exchange::kernel<exchange::kNone>);
const Register kHistogram("histogram", histogram::kernel<histogram::kNone>);
const Register kProduct("product", product::kernel<product::kNone>);
const Register kScratch("scratch", scratch::kernel<scratch::kNone>);
const Register kNamedRing("named_ring", named_ring::kernel<named_ring::kNone>);
const Register kMbarrierRing("mbarrier_ring", mbarrier_ring::kernel<mbarrier_ring::kNone>);
const Register kCopyRing("copy_ring", copy_ring::kernel<copy_ring::kNone>);
const Register kPitfalls("pitfalls", pitfalls::kernel<pitfalls::kNone>);
const Register kAttention("attention", attention::kernel);

}  // namespace
}  // namespace fastgen::kernels
