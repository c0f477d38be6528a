// latent_forward and latent_backward as operators: check, allocate, fill the params, launch.
// Built once for each library; FASTGEN_DISPATCH_KEY says which.
#include <tuple>

#include "common/torch_api.h"
#include "latent/config.h"
#include "latent/launch.h"

namespace fastgen::latent {
namespace {

// A (rows, cols) operand that is read in place, if it is there.
Input input(const MaybeTensor& tensor, const char* name, const Tensor& mu) {
  if (!tensor.has_value()) return {};
  STD_TORCH_CHECK(tensor->dim() == 2 && tensor->size(0) == mu.size(0) && tensor->size(1) == mu.size(1), name,
                  ": expected the shape of mu, two dims");
  STD_TORCH_CHECK(tensor->scalar_type() == mu.scalar_type(), name, ": expected the dtype of mu");
  STD_TORCH_CHECK(tensor->device() == mu.device(), name, ": expected the device of mu");
  STD_TORCH_CHECK(tensor->numel() == 0 || tensor->size(1) == 1 || tensor->stride(1) == 1, name,
                  ": expected a contiguous last dim");
  return {tensor->const_data_ptr(), tensor->stride(0)};
}

Noise noise(const Tensor& seed, const Tensor& mu) {
  const int64_t count = seed.numel(), rows = mu.size(0);
  STD_TORCH_CHECK(
      seed.scalar_type() == ScalarType::Long && seed.dim() == 1 && seed.is_contiguous() && seed.device() == mu.device(),
      "seed: expected a contiguous int64 vector on mu's device");
  STD_TORCH_CHECK(count > 0 && rows % count == 0, "seed: expected a number of seeds that divides ", rows, " rows, got ",
                  count);
  return {seed.const_data_ptr<int64_t>(), rows > count ? rows / count : 1};
}

int element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

std::tuple<Tensor, Tensor> forward(const Tensor& mu, const Tensor& logvar, const MaybeTensor& prior_mu,
                                   const MaybeTensor& prior_logvar, const Tensor& seed, bool with_kl) {
  const DType dtype = dtype_of(mu, "mu");
  const DeviceScope scope(mu);
  ForwardParams p;
  p.mu = input(mu, "mu", mu);
  p.logvar = input(logvar, "logvar", mu);
  p.prior_mu = input(prior_mu, "prior_mu", mu);
  p.prior_logvar = input(prior_logvar, "prior_logvar", mu);
  p.noise = noise(seed, mu);
  p.rows = mu.size(0), p.cols = mu.size(1);
  Tensor z = torch::stable::new_empty(mu, {p.rows, p.cols});
  Tensor kl = torch::stable::new_empty(mu, {with_kl ? p.rows : 0}, ScalarType::Float);
  std::optional<Tensor> partial;
  p.z = z.mutable_data_ptr();
  if (with_kl) {
    p.kl = static_cast<float*>(kl.mutable_data_ptr());
    const Plan plan = make_plan(p.rows, p.cols, element_size(dtype), multiprocessors());
    if (plan.splits > 1) {
      partial = torch::stable::new_empty(mu, {p.rows, plan.splits}, ScalarType::Float);
      p.partial = static_cast<float*>(partial->mutable_data_ptr());
    }
  }
  if (p.rows > 0 && (p.cols > 0 || with_kl)) launch_forward(p, dtype, scope.stream());
  return {z, kl};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const MaybeTensor& grad_z, const MaybeTensor& grad_kl,
                                                    const Tensor& mu, const Tensor& logvar, const MaybeTensor& prior_mu,
                                                    const MaybeTensor& prior_logvar, const Tensor& seed) {
  const DType dtype = dtype_of(mu, "mu");
  const DeviceScope scope(mu);
  BackwardParams p;
  p.grad_z = input(grad_z, "grad_z", mu);
  p.mu = input(mu, "mu", mu);
  p.logvar = input(logvar, "logvar", mu);
  p.prior_mu = input(prior_mu, "prior_mu", mu);
  p.prior_logvar = input(prior_logvar, "prior_logvar", mu);
  p.noise = noise(seed, mu);
  p.rows = mu.size(0), p.cols = mu.size(1);
  if (grad_kl.has_value()) {
    STD_TORCH_CHECK(grad_kl->dim() == 1 && grad_kl->size(0) == p.rows && grad_kl->scalar_type() == ScalarType::Float,
                    "grad_kl: expected a float32 vector with one entry for each row of mu");
    p.grad_kl = grad_kl->const_data_ptr<float>();
    p.grad_kl_stride = grad_kl->stride(0);
  }
  const auto like_mu = [&](bool wanted) {
    return wanted ? torch::stable::new_empty(mu, {p.rows, p.cols}) : torch::stable::new_empty(mu, {0});
  };
  Tensor grad_mu = like_mu(true), grad_logvar = like_mu(true);
  Tensor grad_prior_mu = like_mu(prior_mu.has_value()), grad_prior_logvar = like_mu(prior_logvar.has_value());
  p.grad_mu = grad_mu.mutable_data_ptr(), p.grad_logvar = grad_logvar.mutable_data_ptr();
  if (prior_mu.has_value()) p.grad_prior_mu = grad_prior_mu.mutable_data_ptr();
  if (prior_logvar.has_value()) p.grad_prior_logvar = grad_prior_logvar.mutable_data_ptr();
  if (p.rows > 0 && p.cols > 0) launch_backward(p, dtype, scope.stream());
  return {grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar};
}

}  // namespace

FASTGEN_LIBRARY_IMPL(FASTGEN_NAMESPACE, FASTGEN_DISPATCH_KEY, m) {
  m.impl("latent_forward", TORCH_BOX(&forward));
  m.impl("latent_backward", TORCH_BOX(&backward));
}

}  // namespace fastgen::latent
