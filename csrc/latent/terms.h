// The arithmetic of one element, shared by CPU and CUDA kernels. Formulas: fastgen/reference.py.
//
// Free of cancellation near the prior; the KL is never negative, and infinities have the sign of the formula.
#pragma once

#include <cfloat>
#include <cmath>

#include "common/math.h"
#include "common/types.h"

namespace fastgen::latent {

// a * b, with 0 * inf = 0. NaN propagates.
FASTGEN_HOST_DEVICE float product(float a, float b) {
  const float most = a == 0.0f ? FLT_MAX : INFINITY;
  b = b > most ? most : b;
  b = b < -most ? -most : b;
  return a * b;
}

// z of one element; kl: twice its contribution to KL(N(mu, e^logvar) || N(0, 1)).
// With t = e^(logvar / 2) - 1: e^logvar - 1 - logvar = t^2 + 2 (t - logvar / 2), a sum of positive terms.
FASTGEN_HOST_DEVICE float forward_element(float noise, float mu, float logvar, float& kl) {
  float t, excess;
  const float std = exponentials(0.5f * logvar, t, excess);
  kl = mu * mu + (t * t + 2.0f * excess);
  return mu + noise * std;
}

// The same against N(prior_mu, e^prior_logvar).
FASTGEN_HOST_DEVICE float forward_element(float noise, float mu, float logvar, float prior_mu, float prior_logvar,
                                          float& kl) {
  float expm1, excess;
  exponentials(logvar - prior_logvar, expm1, excess);
  const float difference = product(mu - prior_mu, exp_float(-0.5f * prior_logvar));
  kl = difference * difference + excess;
  return mu + noise * exp_float(0.5f * logvar);
}

struct Gradients {
  float mu, logvar, prior_mu, prior_logvar;
};

// Half the sum of the contributions of z, from_z * std, and of the KL, grad_kl * expm1(r). If both overflow, the sign
// is that of the sum divided by std, with ratio_by_std = grad_kl e^r / std.
FASTGEN_HOST_DEVICE float gradient_of_logvar(float from_z, float std, float from_kl, float ratio_by_std) {
  const float z_part = product(from_z, std);
  const bool both = fabsf(z_part) == INFINITY && fabsf(from_kl) == INFINITY;
  return 0.5f * (both ? INFINITY * (from_z + ratio_by_std) : z_part + from_kl);
}

// Gradients of one element against the unit normal.
FASTGEN_HOST_DEVICE Gradients gradients(float grad_z, float grad_kl, float noise, float mu, float logvar) {
  float t, excess;
  const float std = exponentials(0.5f * logvar, t, excess);
  const float from_kl = product(grad_kl, t * (t + 2.0f));  // expm1(logvar)
  return {grad_z + grad_kl * mu, gradient_of_logvar(grad_z * noise, std, from_kl, grad_kl * std), 0.0f, 0.0f};
}

FASTGEN_HOST_DEVICE Gradients gradients(float grad_z, float grad_kl, float noise, float mu, float logvar,
                                        float prior_mu, float prior_logvar) {
  float ratio, excess;
  exponentials(logvar - prior_logvar, ratio, excess);
  const float root = exp_float(-0.5f * prior_logvar);
  const float difference = product(mu - prior_mu, root);
  const float grad_difference = product(grad_kl, product(difference, root));
  const float ratio_by_std = product(grad_kl, exp_float(0.5f * logvar - prior_logvar));
  const float grad_logvar =
      gradient_of_logvar(grad_z * noise, exp_float(0.5f * logvar), product(grad_kl, ratio), ratio_by_std);
  return {grad_z + grad_difference, grad_logvar, -grad_difference,
          -0.5f * product(grad_kl, ratio + difference * difference)};
}

}  // namespace fastgen::latent
