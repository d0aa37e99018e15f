// Digests of structures and functions: FNV-1a, 64 bits, of a text that any language can write.
//
// A structure is `Name{field:kind size@offset;...}size` and a function `name(kind size,...)kind size`, without spaces,
// where a kind is `p`ointer, `i`nteger, `u`nsigned integer, `f`loat, or `v` of size 0 for no result.

#ifndef POCKETREC_DIGEST_H
#define POCKETREC_DIGEST_H

#include "abi.h"

namespace pocketrec {

struct Digest {
  uint64_t value = 0xcbf29ce484222325u;

  constexpr Digest &text(const char *word) {
    for (; *word != 0; ++word) value = (value ^ static_cast<unsigned char>(*word)) * 0x100000001b3u;
    return *this;
  }

  constexpr Digest &number(std::size_t n) {
    char digits[24] = {};
    int place = 23;
    do digits[--place] = static_cast<char>('0' + n % 10);
    while (n /= 10);
    return text(digits + place);
  }

  template <class Type>
  constexpr Digest &kind() {
    if constexpr (std::is_void_v<Type>) {
      return text("v0");
    } else {
      text(std::is_pointer_v<Type> ? "p" : std::is_floating_point_v<Type> ? "f" : std::is_signed_v<Type> ? "i" : "u");
      return number(sizeof(Type));
    }
  }

  template <class Result, class... Arguments>
  constexpr Digest &signature(Result (*)(Arguments...)) {
    [[maybe_unused]] const char *before = "(";
    ((text(before).template kind<Arguments>(), before = ","), ...);
    return text(sizeof...(Arguments) ? ")" : "()").template kind<Result>();
  }
};

struct Named {
  const char *name;
  uint64_t digest;
};

#define POCKETREC_MEMBER(type, name) \
  text(#name).text(":").kind<decltype(Self::name)>().text("@").number(offsetof(Self, name)).text(";").
#define POCKETREC_STRUCTURE(Name, FIELDS)                                                          \
  constexpr Digest digest_of(const Name *) {                                                       \
    using Self = Name;                                                                             \
    return Digest{}.text(#Name).text("{").FIELDS(POCKETREC_MEMBER) text("}").number(sizeof(Self)); \
  }
POCKETREC_STRUCTURES(POCKETREC_STRUCTURE)
#undef POCKETREC_STRUCTURE
#undef POCKETREC_MEMBER

#define POCKETREC_STRUCTURE(Name, FIELDS) {#Name, digest_of(static_cast<const Name *>(nullptr)).value},
#define POCKETREC_FUNCTION(name) {#name, Digest{}.text(#name).signature(&name).value},
constexpr Named DIGESTS[] = {POCKETREC_STRUCTURES(POCKETREC_STRUCTURE) POCKETREC_FUNCTIONS(POCKETREC_FUNCTION)};
#undef POCKETREC_FUNCTION
#undef POCKETREC_STRUCTURE

}  // namespace pocketrec

#endif  // POCKETREC_DIGEST_H
