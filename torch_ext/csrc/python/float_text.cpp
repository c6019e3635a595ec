// The shortest decimal of a float, after R. Giulietti, "The Schubfach way to render doubles" (2020), for 32 bits. libstdc++
// has it as std::to_chars from GLIBCXX_3.4.29 on, which is newer than what wheels may ask for.
#include "python/float_text.h"

#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>

namespace torch_ext {
namespace {

// 2^q has floor(log10) from -45 to 31, so numbers are scaled by 10^-31 to 10^45.
constexpr int kLeastPower = -31, kLargestPower = 45;

constexpr int floor_log2_of_power_of_10(int e) { return (e * 1741647) >> 19; }

// An unsigned integer of 256 bits, for the table.
struct Wide {
  std::array<uint32_t, 8> limbs = {};  // the least significant first

  constexpr void multiply(uint32_t factor) {
    uint64_t carry = 0;
    for (uint32_t& limb : limbs) {
      carry += uint64_t{limb} * factor;
      limb = static_cast<uint32_t>(carry);
      carry >>= 32;
    }
  }
  constexpr void divide(uint32_t divisor) {
    uint64_t rest = 0;
    for (size_t i = limbs.size(); i-- > 0;) {
      rest = rest << 32 | limbs[i];
      limbs[i] = static_cast<uint32_t>(rest / divisor);
      rest %= divisor;
    }
  }
  constexpr uint64_t low() const { return uint64_t{limbs[1]} << 32 | limbs[0]; }
};

// For each power e: 10^e, scaled by a power of 2 to 64 bits, rounded down, plus 1.
constexpr auto kPowersOf10 = [] {
  std::array<uint64_t, kLargestPower - kLeastPower + 1> table = {};
  for (int e = kLeastPower; e <= kLargestPower; ++e) {
    const int shift = 63 - floor_log2_of_power_of_10(e);
    Wide power;
    power.limbs[0] = 1;
    for (int i = 0; i < e; ++i) power.multiply(10);
    for (int i = 0; i < shift; ++i) power.multiply(2);
    for (int i = 0; i < -shift; ++i) power.divide(2);
    for (int i = 0; i < -e; ++i) power.divide(10);
    table[static_cast<size_t>(e - kLeastPower)] = power.low() + 1;
  }
  return table;
}();

// g * c / 2^64, with the lowest bit set where the division leaves a rest that counts.
uint32_t scaled(uint64_t g, uint32_t c) {
  const auto product = static_cast<unsigned __int128>(g) * c;
  const auto whole = static_cast<uint32_t>(product >> 64);
  const auto rest = static_cast<uint32_t>(product >> 32);
  return whole | (rest > 1);
}

// value = digits * 10^exponent; digits is not 0.
struct Decimal {
  uint32_t digits;
  int exponent;
};

// The shortest decimal in the interval of numbers that round to significand * 2^q; see the paper for the names.
Decimal shortest(uint32_t fraction, uint32_t biased) {
  const uint32_t c = biased ? fraction | 1u << 23 : fraction;
  const int q = biased ? static_cast<int>(biased) - 150 : -149;
  const bool lower_is_closer = fraction == 0 && biased > 1;
  const bool even = c % 2 == 0;
  const int k = (q * 1262611 - (lower_is_closer ? 524031 : 0)) >> 22;
  const int h = q + floor_log2_of_power_of_10(-k) + 1;
  const uint64_t g = kPowersOf10[static_cast<size_t>(-k - kLeastPower)];
  const uint32_t left = scaled(g, (4 * c - 2 + lower_is_closer) << h);
  const uint32_t centre = scaled(g, 4 * c << h);
  const uint32_t right = scaled(g, (4 * c + 2) << h);
  const uint32_t lower = left + !even, upper = right - !even;
  const uint32_t s = centre / 4;
  if (s >= 10) {
    const uint32_t tens = s / 10;
    const bool below = lower <= 40 * tens, above = 40 * tens + 40 <= upper;
    if (below != above) return {tens + above, k + 1};
  }
  const bool below = lower <= 4 * s, above = 4 * s + 4 <= upper;
  if (below != above) return {s + above, k};
  const uint32_t middle = 4 * s + 2;
  const bool up = centre > middle || (centre == middle && s % 2 == 1);
  return {s + up, k};
}

// Sixteen bytes, of which fewer may count: quicker than as many as count.
void copy_16(char* out, const char* from) { std::memcpy(out, from, 16); }

char* copy(char* out, std::string_view text) {
  std::memcpy(out, text.data(), text.size());
  return out + text.size();
}

constexpr auto kPairs = [] {
  std::array<char, 200> pairs = {};
  for (size_t i = 0; i < 100; ++i) {
    pairs[2 * i] = static_cast<char>('0' + i / 10);
    pairs[2 * i + 1] = static_cast<char>('0' + i % 10);
  }
  return pairs;
}();

// Writes a number's digits before `end` and returns where they begin.
char* write_digits_before(char* end, uint32_t number) {
  while (number >= 100) {
    end -= 2;
    std::memcpy(end, &kPairs[2 * (number % 100)], 2);
    number /= 100;
  }
  if (number >= 10) {
    end -= 2;
    std::memcpy(end, &kPairs[2 * number], 2);
    return end;
  }
  *--end = static_cast<char>('0' + number);
  return end;
}

}  // namespace

char* write_float(float value, char* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t fraction = bits & 0x7fffff, biased = bits >> 23 & 0xff;
  if (biased == 0xff) return copy(out, "null");
  *out = '-';
  out += bits >> 31;
  if (fraction == 0 && biased == 0) return copy(out, "0.0");
  auto [digits, exponent] = shortest(fraction, biased);
  while (digits % 10 == 0) {
    digits /= 10;
    ++exponent;
  }
  char text[32] = {};
  char* const end = text + 16;
  const char* const first = write_digits_before(end, digits);
  const int count = static_cast<int>(end - first);
  const int point = count + exponent;  // digits before the point
  if (point <= 0 && point > -6) {
    copy(out, "0.00000");
    out += 2 - point;
    copy_16(out, first);
    return out + count;
  }
  if (exponent >= 0 && point <= 13) {
    copy_16(out, first);
    std::memset(out + count, '0', 16);
    return copy(out + point, ".0");
  }
  if (point > 0 && point <= 13) {
    copy_16(out, first);
    out[point] = '.';
    copy_16(out + point + 1, first + point);
    return out + count + 1;
  }
  *out++ = *first;
  if (count > 1) {
    *out++ = '.';
    copy_16(out, first + 1);
    out += count - 1;
  }
  *out = 'e';
  out[1] = '-';
  out += point - 1 < 0 ? 2 : 1;
  const auto power = static_cast<uint32_t>(std::abs(point - 1));
  if (power >= 10) {
    std::memcpy(out, &kPairs[2 * power], 2);
    return out + 2;
  }
  *out++ = static_cast<char>('0' + power);
  return out;
}

}  // namespace torch_ext
