// The arithmetic of one element, the same on every backend. Formulas: fastgen/reference.py.
//
// Written so that nothing cancels near the prior, no KL is negative, and infinities have the sign of the formula.
#pragma once

#include <cfloat>
#include <cmath>

#include "common/math.h"
#include "common/types.h"

namespace fastgen::latent {

// a b, where an overflowed b is ignored if a is 0. NaN passes through.
FASTGEN_HOST_DEVICE float product(float a, float b) {
  const float most = a == 0.0f ? FLT_MAX : INFINITY;
  b = b > most ? most : b;
  b = b < -most ? -most : b;
  return a * b;
}

// z of one element; gives twice its share of KL(N(mu, e^logvar) || N(0, 1)).
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

// Half the sum of what logvar gets from z, from_z std, and from the KL, grad_kl expm1(r). Where both overflow, the sign
// is that of the sum divided by std, where ratio_by_std = grad_kl e^r / std.
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
  const float slope = product(grad_kl, product(difference, root));
  const float ratio_by_std = product(grad_kl, exp_float(0.5f * logvar - prior_logvar));
  const float grad_logvar =
      gradient_of_logvar(grad_z * noise, exp_float(0.5f * logvar), product(grad_kl, ratio), ratio_by_std);
  return {grad_z + slope, grad_logvar, -slope, -0.5f * product(grad_kl, ratio + difference * difference)};
}

}  // namespace fastgen::latent
