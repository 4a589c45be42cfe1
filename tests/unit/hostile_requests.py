"""Certificate requests with keys and signatures that `cryptography` does not make any more, and DER by hand.

The samples are openssl's, each with the subject serialNumber=SN-1, as base64 of DER; their private keys are gone.
"""

import base64
from collections.abc import Callable

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

_SAMPLES = {
    # openssl genrsa 512; req -new -sha256
    "rsa512": (
        "MIHIMHQCAQAwDzENMAsGA1UEBRMEU04tMTBcMA0GCSqGSIb3DQEBAQUAA0sAMEgCQQCsqE0RvAWTYeJk4Uh8xpZdL4HR0JgbIo3R"
        "/01OJCtgkUgacddEFuvcBRTwBqjHne5GUtuyo+VzVnAu8G44ZPS7AgMBAAGgADANBgkqhkiG9w0BAQsFAANBAKfOiGE3J+GFOvhj"
        "nT23jl/bqr52MdO0m04R1FxvSAcQpMKd4Qb0EFxlA9VVd39+q/FaLQkQLYtZuLSj+VJUeUM="
    ),
    # openssl genrsa 1024; req -new -sha256
    "rsa1024": (
        "MIIBTjCBuAIBADAPMQ0wCwYDVQQFEwRTTi0xMIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQDJFFsIpw1IMmBndg+qaKPei7tg"
        "I8K4AaCjKbeUSlEzW/a0EwUk37zZeOXGBNJgwNHTO5ePt/YJcTSjPMgcSgE4grkNaYNXopAgrWsX408UbyrruhZd5EwmGBEq9cLo"
        "csSM2FvJTsUAlQaUGFAUKZgUutfESRjBWFB7TrYl2UuwiQIDAQABoAAwDQYJKoZIhvcNAQELBQADgYEAOf10xEBerfU/H30dGO8K"
        "zCMHHTZt8xax+YMWD8YIbP5c028OGCsrg9Y0utr5mnHUKsXO0H2R9+VJSmPPKxKZ7FSOQE0ZVqawL7J6epRd/FCtVewZqiyPZnna"
        "3Tno7AL6a4oa09LuFLym90Vzc6rFHxZwTQwe9qE20qLir/7X6bw="
    ),
    # openssl genrsa -3 2048; req -new -sha256
    "rsa_e3": (
        "MIICUjCCAToCAQAwDzENMAsGA1UEBRMEU04tMTCCASAwDQYJKoZIhvcNAQEBBQADggENADCCAQgCggEBAMmG/raDruTyKMDsSth/"
        "arJ1zscyLLCtTke2w4aI5QsAPsECOsiQ6+tqaJseEXLXFY+7gtxFGO77k/5mZxktrNVxpVCBt6+j85I0AdcDMfuCUsCwRIc6Xmqd"
        "AYCMVEHn7QprwvTA69n2Pipk0IhZGO+3WG1ZwdaT52lNFeVtuFoNdsnStqLD/fBEWtx2cZ/ZFYN/31ezLeh90M3sRla023MIPsTB"
        "2h6ya3Lf4PF+eX8W+SdtSHnuPjUQDnX6a6w2lWhYUGMUrH63B/I7+Yus39D6T6H2dND7gjjCfuIJ267UYdoilnUSWRB7tDbq/gvj"
        "IRCLz91O4IlzDQ2LIuwl3r8CAQOgADANBgkqhkiG9w0BAQsFAAOCAQEAqHhGNsEWP7djAiv9Jh7khwB3loMLUoqtrH28mnRKfHZL"
        "0qyXl/2AFfZj5/Nwden0EZSIULBTTJA79mUTc+GwN8IqqBqLslBV8cxA5xTMTcJalVGbY00mDp6k0Gl6EPztEyG50a7prRg/f4Hd"
        "J1Gk+fy83UCxXvfo3+jB6Yz5EMXG2Z8/OlvJ+1JgJEFdvADILyXBpigVhVMCWnyy3DqncBUka+IvsytsF4jklGuhGBVaNS6zVYT8"
        "Yy1U5WJl3r6wue5/K6RY/CDDHkI4ycFZR2R3QKEo2sGqW3eY8cXut6UV25OA6i5PBg9zlap91EYL9eY+rp2pN8eTgj9gCgdOZA=="
    ),
    # openssl dsaparam -genkey 1024; req -new -sha256
    "dsa": (
        "MIICLDCCAdoCAQAwDzENMAsGA1UEBRMEU04tMTCCAcAwggE0BgcqhkjOOAQBMIIBJwKBgQD8uvd+EWSpAMXwsDRYYKNPLP4C+iKo"
        "L/k9ltwcrzeZQHLujVNOQvDRnVzcUmNRBvV2m4D7GITL9sVH7Z3k7mWgTPQ530bowEZJygT370LQyxN8CyfkIQjN3jrxHvqq7HYg"
        "tf4LvnJNtLmrlesRuqfi8FmqA/0xyXK3UA6ETkYZ2wIdANQWlTRhyWNJEfQEqUVH9Zo5CMoVXFHVqSGFaa8CgYEA2DarARoSGYvR"
        "UtCPilhj3jcXEB+MesUdgxxLoTd8bh00wnJe8GRxJMqJo9tbmhPxkGjN5Pa0hj1IKpa4urF/3rXXp82bl2W2nvozl9rbwa80m7cV"
        "IVVPaXmvLcB3eSDYYPAgyus448pVUSxO85jAeki03Ohm1mWMyCrmE416+IkDgYUAAoGBAOMut2W33N8vqM/6vRTvQFJVrUp4IyUH"
        "2F0XsY2RnWjA8vzm6pcPtzXohPsZ2MEHn3DOwQyOjmI0fLmnJxv2k3sdRXjHVE4ikjxQqSjbZtxbSX828gys+RuwjQ5orr/Kesmr"
        "IhETiibZ9kQf6/B9MMh6iudwsrHhiOsW4fr2ioaWoAAwCwYJYIZIAWUDBAMCAz8AMDwCHDFX7wMds1ktF0nf9V2QLDrOXv0LzWWf"
        "cQLDiUcCHGkoayR41yVwqk3FuS4e0j2EU6kSQvNlcgxX93I="
    ),
    # openssl ecparam -genkey -name prime192v1; req -new -sha256
    "prime192v1": (
        "MIGpMGECAQAwDzENMAsGA1UEBRMEU04tMTBJMBMGByqGSM49AgEGCCqGSM49AwEBAzIABM5QqDMvsNu8HrBDR49f9GFtepEPX36R"
        "QYqQA0wxhJ+5wNtRPqqFJn/OlsQmXyHBJqAAMAoGCCqGSM49BAMCAzgAMDUCGQCzgetkzm35c3cKdc/JDaDd9dwHVKAYaBICGE1x"
        "wA7SEz22IvQXivnrqYHjaRE3oD8DlA=="
    ),
    # openssl ecparam -genkey -name secp224r1; req -new -sha256
    "secp224r1": (
        "MIG3MGYCAQAwDzENMAsGA1UEBRMEU04tMTBOMBAGByqGSM49AgEGBSuBBAAhAzoABGXJcioAEPBDDEo+EmKAH3RFLRmcFmEaMPnG"
        "+EBpdw4U4F2CTzwjyxc7H32NyLnMsjryGiKcy5n2oAAwCgYIKoZIzj0EAwIDQQAwPgIdAPsLUcFwUU0Da+7VcFe3rOBhZ7Wffeue"
        "XlIfnI4CHQDCMIcVG1dzQR+zxDPdzxoV3vubwfsi4JLN/Hdv"
    ),
    # openssl ecparam -genkey -name secp256k1; req -new -sha256
    "secp256k1": (
        "MIHHMG4CAQAwDzENMAsGA1UEBRMEU04tMTBWMBAGByqGSM49AgEGBSuBBAAKA0IABGUJmAQbQ6+QGd7j6IhECBtm94UDj6TTV4Bz"
        "KKBQu4VsaBD3wDxGXNDpEPezJK9zu1gs6OUQPxcNS1GAKe2dOFygADAKBggqhkjOPQQDAgNJADBGAiEA+0M28Kyk/A/R+rkC5Rle"
        "c+X2X6dZAmLT8x9PWqL1MxYCIQDQkqnl/+gFUJWAKTGppQeSlBTgDb/QYLNrPMe1cStgFg=="
    ),
    # openssl ecparam -genkey -name secp521r1; req -new -sha256
    "secp521r1": (
        "MIIBUjCBtAIBADAPMQ0wCwYDVQQFEwRTTi0xMIGbMBAGByqGSM49AgEGBSuBBAAjA4GGAAQAuNM+DS/4Gi8MDYuTMjV6zmSZgwB4"
        "uf3xmMgHJWc4Upa4pwnDNrK7MkZFLlaDUe1Tl3VvI61xHFCMVxOsAOZJEMIBcCcQFRUXStkq364TYYHHK7CgYSPcE9gY2LANNRHE"
        "l7VEH6U1hqNetFRMPfzSDtGGGjMVsdHnUtja8ovzjYe/JzGgADAKBggqhkjOPQQDAgOBjAAwgYgCQgE6M6470XE4eAbTqaZjfxv7"
        "Y1qUsg/xrPOUL0OYQv8yxjY90WEDdgqpIiswkPp+aQs4Zp52lcT6CtIKOBgsmisj1wJCAfFwFAohKldx1KjtlWHYGrArXkNET+oo"
        "AVc4AiuaYeLCw7wVlV/h7G0YKQ0clF0AFGb7/yZMjmrnT+9bhGvVv5y/"
    ),
    # openssl ecparam -genkey -name brainpoolP256r1; req -new -sha256
    "brainpoolP256r1": (
        "MIHLMHICAQAwDzENMAsGA1UEBRMEU04tMTBaMBQGByqGSM49AgEGCSskAwMCCAEBBwNCAAQp4NeSYDhvLxauW31GS6Ol4cKzBz8R"
        "3KVYKBdIONB1U1MP423lzFPJoXiyBL2YRXWci1Jkj+nYyeGfDOWb2wkSoAAwCgYIKoZIzj0EAwIDSQAwRgIhAKTU6iRZPpQDJ9Nn"
        "WlgdR3XyEzfvKfZFszsactBmbBvjAiEAhRH7lDHrtf/kWb0+mTxkEZwwHc90mAkED1B4jzZuj1w="
    ),
    # openssl genpkey -algorithm ed448; req -new
    "ed448": (
        "MIHZMFsCAQAwDzENMAsGA1UEBRMEU04tMTBDMAUGAytlcQM6AOwjObm48gdPdvAn8SbWZOsriA7FEutWT2z9o2UYa1SIucdv/xki"
        "AA5dFaEvxCg1YnXeJfVfmySPAKAAMAUGAytlcQNzAHWqdtcR360E46GhCSgWRqZ/BtLbdwWaUanJ/4+jQISc2ck5d2F1XeAbYfoo"
        "I15gbhV4mINQSzfbgBm4qh05woxRKthILPTw0RvOI+ksgLcXWVd0+HgD8uXyt1+ce/hUIExjku+ukSQaSJOMwBqc1qsYAA=="
    ),
    # openssl genrsa 2048; req -new -md5
    "md5": (
        "MIICVDCCATwCAQAwDzENMAsGA1UEBRMEU04tMTCCASIwDQYJKoZIhvcNAQEBBQADggEPADCCAQoCggEBAOPxAqik5CcxDjhHJUmh"
        "/P4DDL3ZelWhNjoLXhwK9EumYJ5JuWInipzpyEMNkVJsea9kk5fPfXEcEhiMIMCD73QmM+Xo1tRN4INRqlZKLi+71lRUK0f00wdh"
        "I0OZhknUktb0GGZ1cMxNGt1TiqkJ6/8ndLABFqNdkkFhjgDNeGM7jSrEOppLmDD0SGzssrVpMy6mTAkAMN1K59AgxU9LkLW2Cgsj"
        "FXo95n/CiZsmwSNV2ylFothSrdXoA61ccPjMo5TBitbVODsrBkz/mggp6o+jcD/9tYpAsz6lYswxRe7j2EfFRB/lJjfV/90nJ3uD"
        "KiTbWP4zcxyYBINoIB6XNHUCAwEAAaAAMA0GCSqGSIb3DQEBBAUAA4IBAQCwvZPL3tCYIinky8FpflQgTtjryQwPcyo4XJpl1Z6X"
        "2QdP6HA2TMdGNiZYjnZC1JrULNVVG5BDpuEKtLfiR36EZua1RcFif4m33Q5zxyeHMugWwqb+xtyAcGXd5GSRkt9djdXC/CTamLxs"
        "EwMEkqkbWghzws6qqJ+MmW4jZ/+/p3j3vVzJp+WgjGwfecg7JmTmeE+baKucTze2JVpppKTWYQ5XEWUtw95xrDo8++D464MmkzY7"
        "0jlZy0iq2YpDpSCg6BLQkCeNWHC9cqfbXVfShohbpUcdfkZBFMi/B+EVqFrJLg0tRJ1tb7LPm2JR6GBJ5RS/X4Ehb/cDcjRKWujl"
    ),
    # openssl genrsa 2048; req -new -sha1
    "sha1": (
        "MIICVDCCATwCAQAwDzENMAsGA1UEBRMEU04tMTCCASIwDQYJKoZIhvcNAQEBBQADggEPADCCAQoCggEBAOPxAqik5CcxDjhHJUmh"
        "/P4DDL3ZelWhNjoLXhwK9EumYJ5JuWInipzpyEMNkVJsea9kk5fPfXEcEhiMIMCD73QmM+Xo1tRN4INRqlZKLi+71lRUK0f00wdh"
        "I0OZhknUktb0GGZ1cMxNGt1TiqkJ6/8ndLABFqNdkkFhjgDNeGM7jSrEOppLmDD0SGzssrVpMy6mTAkAMN1K59AgxU9LkLW2Cgsj"
        "FXo95n/CiZsmwSNV2ylFothSrdXoA61ccPjMo5TBitbVODsrBkz/mggp6o+jcD/9tYpAsz6lYswxRe7j2EfFRB/lJjfV/90nJ3uD"
        "KiTbWP4zcxyYBINoIB6XNHUCAwEAAaAAMA0GCSqGSIb3DQEBBQUAA4IBAQA82YrMxxoCQxxya5QN++F946fYxchQAHnH3Eo7Aj7a"
        "Uae1hLoUGp8rbje7rGwIT+yd6ofaKWv2BlutLDcZnSLmzx9aCeF91mckMBlffwxnK/L2iRBXjMdRVqrXgxQYi6K7j9dTxkLxGDw8"
        "VUXDygOIJi7AvCtgNVI4UvfBzDxn42U5e9s//76IRnzBo34lLOyQrreRDRzyZ6IrEiorBTSz18JLe9rI+s9k5ugnFcQVWET1Zp4/"
        "/GyrqXkRKYIExr1q3n6kQTByyZ9wb7NeeoJb1JVZZcqfuS+mZlkYV7pB4DtfIzk9QpVhuOUzcvlicSZVhc81ppUVBd2HIiZULQeH"
    ),
    # openssl ecparam -genkey -name prime256v1; req -new -sha1
    "ecsha1": (
        "MIHHMHECAQAwDzENMAsGA1UEBRMEU04tMTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABCeelmVs7QRY7UJ5ZzHqUREYd5M/dRrx"
        "95tW679KvswAso9Gt7tnfQB3DCvF8hKoZuWE+9cYR6g3wdkb88eg2nWgADAJBgcqhkjOPQQBA0cAMEQCIDUfBpp0C4m7Sk4X2eQt"
        "eMmdGnHLDRwzSbkXquXwhPciAiBG0tuqeywGmL5ghQAwi0MAMvFI2nk2jk8UypTHZadYBw=="
    ),
    # openssl genrsa 2048; req -new -sha1 -sigopt rsa_padding_mode:pss
    "pss_sha1": (
        "MIICWjCCATwCAQAwDzENMAsGA1UEBRMEU04tMTCCASIwDQYJKoZIhvcNAQEBBQADggEPADCCAQoCggEBAOPxAqik5CcxDjhHJUmh"
        "/P4DDL3ZelWhNjoLXhwK9EumYJ5JuWInipzpyEMNkVJsea9kk5fPfXEcEhiMIMCD73QmM+Xo1tRN4INRqlZKLi+71lRUK0f00wdh"
        "I0OZhknUktb0GGZ1cMxNGt1TiqkJ6/8ndLABFqNdkkFhjgDNeGM7jSrEOppLmDD0SGzssrVpMy6mTAkAMN1K59AgxU9LkLW2Cgsj"
        "FXo95n/CiZsmwSNV2ylFothSrdXoA61ccPjMo5TBitbVODsrBkz/mggp6o+jcD/9tYpAsz6lYswxRe7j2EfFRB/lJjfV/90nJ3uD"
        "KiTbWP4zcxyYBINoIB6XNHUCAwEAAaAAMBMGCSqGSIb3DQEBCjAGogQCAgDqA4IBAQBsZB7VVgwpPGx5Dz06kktQRpuYakR0p7Dd"
        "ZlndF4ZGySfboGr1U6krexbTqRgFSzWCeUDhepM8Uz8oW0lA5r+d21J7Ght4O1fnY3O6ON/gQRRAevyUW7boA3oktifRfKQhjX+I"
        "edWpoeXvZ0D81Zr+AeUaJBGe2PE88CDSiJzBUAN1fIDL/oPCzBjS5SoeaeABqW20SrFYSpOWMufR9AaN7I0ULlRmmnUq5xDAW6zv"
        "H2aN9LEHt7ypWaNf3WkbUu68mtJXmHDKz9OTVzeJI7PyKjYAU0gSNT/A49ep9v67/MzaN8HcafwNLTDc0Ez/8z4+06SijUP7jKZr"
        "mbYkd64I"
    ),
    # openssl genrsa 2048; req -new -sha256 -sigopt rsa_padding_mode:pss
    "pss": (
        "MIICiTCCATwCAQAwDzENMAsGA1UEBRMEU04tMTCCASIwDQYJKoZIhvcNAQEBBQADggEPADCCAQoCggEBAOPxAqik5CcxDjhHJUmh"
        "/P4DDL3ZelWhNjoLXhwK9EumYJ5JuWInipzpyEMNkVJsea9kk5fPfXEcEhiMIMCD73QmM+Xo1tRN4INRqlZKLi+71lRUK0f00wdh"
        "I0OZhknUktb0GGZ1cMxNGt1TiqkJ6/8ndLABFqNdkkFhjgDNeGM7jSrEOppLmDD0SGzssrVpMy6mTAkAMN1K59AgxU9LkLW2Cgsj"
        "FXo95n/CiZsmwSNV2ylFothSrdXoA61ccPjMo5TBitbVODsrBkz/mggp6o+jcD/9tYpAsz6lYswxRe7j2EfFRB/lJjfV/90nJ3uD"
        "KiTbWP4zcxyYBINoIB6XNHUCAwEAAaAAMEIGCSqGSIb3DQEBCjA1oA8wDQYJYIZIAWUDBAIBBQChHDAaBgkqhkiG9w0BAQgwDQYJ"
        "YIZIAWUDBAIBBQCiBAICAN4DggEBAFQqVSBJdog+BVEQZ6HCSeZ3uFMYKmzQvgpKhftYfJt/awkbeKQIMsgBxAXt1siWVF7xcs50"
        "LygDbC+NTumZE0/gpl02I+Wto3NLIcK46FHJ+E9eNnOYY7heWil+fNvDWcJgSiThNjx/QaZ8ueZGeEwJuHE2zcWOduf/ALdNX/Ja"
        "t2/ON3lHtPkW7xq6By8jg0wAU9aqEjDa+oV7RBz5XWEXlQoZCgrPyshsgLx6V4iXL10UrJNI0XLo1ln+T0bNgj/H80W/USejB9Kh"
        "PCktKQUYAkkIkn5a8YVbBeLUq5DhSvqgYLYCHzIuYe/p8riE+Mmily5x7Q0y34xbVvgw3OQ="
    ),
    # openssl ecparam -genkey -name prime256v1 -param_enc explicit; req -new -sha256
    "explicit": (
        "MIIBvjCCAWUCAQAwDzENMAsGA1UEBRMEU04tMTCCAUswggEDBgcqhkjOPQIBMIH3AgEBMCwGByqGSM49AQECIQD/////AAAAAQAA"
        "AAAAAAAAAAAAAP///////////////zBbBCD/////AAAAAQAAAAAAAAAAAAAAAP///////////////AQgWsY12Ko6k+ez671VdpiG"
        "vGUdBrDMU7D2O848PifSYEsDFQDEnTYIhucEk2pmeOETnSa3gZ9+kARBBGsX0fLhLEJH+Lzm5WOkQPJ3A32BLeszoPShOUXYmMKW"
        "T+NC4v4af5uO5+tKfA+eFivOM1drMV7Oy7ZAaDe/UfUCIQD/////AAAAAP//////////vOb6racXnoTzucrC/GMlUQIBAQNCAAS9"
        "w1Q8Oao+9gwRp+VTvraP0JwMF7P7XVFNXd/jdIbjsy+mxOgVufQyXMYPYDWPVp+keGjnM5aE3SNlOd+50y1CoAAwCgYIKoZIzj0E"
        "AwIDRwAwRAIgWmFsY80ngWYj0/jJvxyXxMphs0vcR5mP4n7lrl+DOL0CIAezAMtCX9e6kHxu+NKJfoXI3d19koGALvculBFuHEXx"
    ),
}


def sample(name: str) -> bytes:
    """A request as DER."""
    return base64.b64decode(_SAMPLES[name])


UTF8, PRINTABLE, BMP, TELETEX, BITS = 0x0C, 0x13, 0x1E, 0x14, 0x03
COMMON_NAME, SERIAL_NUMBER = bytes.fromhex("0603550403"), bytes.fromhex("0603550405")
EXTENSION_REQUEST = bytes.fromhex("06092a864886f70d01090e")
ECDSA_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")


def der(tag: int, *parts: bytes) -> bytes:
    """One element."""
    body = b"".join(parts)
    size = len(body)
    if size < 128:
        return bytes([tag, size]) + body
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + body


def attribute(oid: bytes, text: str | bytes, tag: int = UTF8) -> bytes:
    """A relative distinguished name of one attribute."""
    return der(0x31, der(0x30, oid, der(tag, text.encode() if isinstance(text, str) else text)))


def extension_request(*extensions: bytes) -> bytes:
    """The attribute that asks for extensions."""
    return der(0x30, EXTENSION_REQUEST, der(0x31, der(0x30, *extensions)))


def request(
    *names: bytes,
    key: ec.EllipticCurvePrivateKey | None = None,
    version: bytes = b"\x00",
    spki: bytes | None = None,
    attributes: bytes = b"",
    algorithm: bytes = ECDSA_SHA256,
    signature: Callable[[bytes], bytes] = lambda signature: signature,
) -> bytes:
    """PKCS#10 by hand, signed by its key, whatever it says."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    public = spki or key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    info = der(0x30, der(0x02, version), der(0x30, *names), public, der(0xA0, attributes))
    signed = signature(key.sign(info, ec.ECDSA(SHA256())))
    return der(0x30, info, algorithm, der(0x03, b"\x00", signed))
