"""Characters that look alike, and the skeleton of a name: the name with these characters replaced by a prototype.

UTS #39 (Unicode Security Mechanisms), section 4: two names are confusable if their skeletons are equal.
"""

from __future__ import annotations

import unicodedata

# From confusables.txt, version 17.0.0 (https://www.unicode.org/Public/security/17.0.0/confusables.txt),
# (c) Unicode, Inc., https://www.unicode.org/license.txt, limited to the characters of names of
# `rtservice.protocols.names`: letters of its scripts, the marks in their decompositions, and ASCII digits, without
# Hangul. Each word is a prototype, a colon, and the characters that are replaced by the prototype.
_CONFUSABLES = (
    "':ꞌ /:ノ丿 2:ƧꙄꝚ 3:ƷȜЗӠꝪꞫ 5:Ƽ 6:б 8:Ȣȣ 9:Ꝯ ?:Ɂʔॽ A:ΑА AA:Ꜳ AE:ÆӔ AO:Ꜵ AU:Ꜷ AV:ꜸꜺ AY:Ꜽ B:ΒВꞴ C:С E:ΕЕ "
    "F:ϜꞘ G:Ԍ H:ΗН J:ͿЈꞲ K:ΚК M:ΜϺМ N:Ν O:0ΟОՕଠዐ OE:Œ OO:ꚘꝎ P:ΡР R:Ʀ S:ЅՏ T:ΤТ T3:Ꜩ U:Սሀ V:Ѵ W:Ԝ X:ΧХꞳ Y:ΥУҮ "
    "Z:Ζ a:ɑαа aa:ꜳ ae:æӕ ao:ꜵ au:ꜷ av:ꜹꜻ ay:ꜽ b:ƄЬ bl:Ы c:сငၚᴄ d:ԁ dz:ʣ dȝ:ʤ dʑ:ʥ e:еҽꬲ f:ƒքẝꞙꬵ g:ƍɡցᶃ h:һհ "
    "i:ıɩɪιіւꙇ j:ϳј l:1IƖǀΙІӀӏ lO:Ю ll:ǁ ls:ʪ lz:ʫ lȝ:ɮ n:ոռ o:οσоօഠဝჿᴏᴑꬽ oe:œ oo:ꚙꝏ oരo:ൟ oᴇ:ɶ p:þƿρϸр q:ԛգզ "
    "r:гᴦꭇꭈ rn:m s:ƽѕടꜱ tf:ꝷ ts:ʦ tȝ:ꜩ tɕ:ʨ tʃ:ʧ u:ʋυսᴜꞟꭎꭒ ue:ᵫ uo:ꭣ v:νѵᴠ w:ɯшѡԝաᴡ x:х y:ɣʏγуүყᶌỿꭚ z:ᴢ Þ:Ϸ "
    "ß:βẞꞵꟖ ĸ:κкᴋ ƅ:ь ƅi:ы Ɔ:Ͻ Ə:Ә Ɛ:Ԑ ƨ:ᴤꙅ Ʃ:Σ ǝ:əә ǝo:ᴔ Ƕ:Ԋ ȝ:ʒӡჳꝫ ȷ:յ Ʌ:ΛЛ ɋ:ᶐ ɔ:ͻᴐↄ ɔe:ꭢ ɜ:зᴈ ɢ:ԍ ɰ:պሣ "
    "ɸ:φф ʃ:ꭍ ʌ:ᴧ ʍ:мᴍ ʘ:Ꙩ ʙ:в ʚ:ꞝ ʜ:н Γ:Г Π:П Φ:ФՓቀ Ψ:Ѱ π:пᴨ ς:ϛ χ:ꭓꭕ ψ:ѱ ω:ꙍꞷ И:Ͷ Ъl:Ꙑ л:ᴫ ч:પ љ:ꭠ Ҷ:Ӌ ҷ:ӌ "
    "Ո:በ ձ:ኔ उ:ਤ ट:ਟ ठ:ਠ ढ:ਫ प:ਧ भ:ਮ म:ਸ व:ਕ ह:ਵ ऽ:ઽ র:ৰ ஈ:ர உ:ഉ உள:ஊ ஐ:ஜജ ண:ണ ம:ഥ ழ:ഴ வ:ഖ ஶ:ஸശ అ:ಅ ఆ:ಆ ఇ:ಇ "
    "ఐ:ಐ ఒ:ಒ గ:ಗ జ:ಜ ఝ:ಝ ఞ:ಞ ట:ಟ ణ:ಣ ద:ದ న:ನ య:ಯ ర:ರ ఱ:ಱ ల:ಲ ళ:ಳ ഞ:ൡ ര:റဂი එ:ඵ ඔ:ඹ ඛ:බ ච:ව භ:හ ข:ฃ ค:ดต ฆ:ม "
    "จ:ຈ ช:ซ ฎ:ฏ ฑ:ท บ:ບ ป:ປ ฝ:ຝ พ:ພ ฟ:ຟ ภ:ฦ ย:ຍ า:ๅ เเ:แ ར:ཪ ሆ:Մ ቡ:Ռ ኮ:Ի ጣ:Պ ដ:ត អ:ឣ ᴎ:ͷи ᴘ:ᴩ ᴙ:я ᴛ:τт ẟ:δծ "
    "❬:く𡿨 Ⱶ:Ͱ へ:ヘ ー:一ꟷ 㖈:䎛 㘽:㦳 㩁:搉 㫚:曶 㬵:胶 㬺:幐 㬻:䐠 㮣:槩 䀹:鿃 䀿:晣 䑃:朦 䚶:訞 二:ニ "
    "亻:イ 併:倂 値:值 儿:ㄦ 八:ハ 凵:𠙴 力:カ 卑:𭅡 卜:ト 口:ロ囗 啓:啟 土:士 塡:填 墫:壿 壷:𡔳 夕:タ 多:𡖇 "
    "媯:嬀 工:エ 帡:帲 徚:𢔅 戶:戸 晚:晩 朌:肦 朏:胐 朐:胊 朓:脁 朘:脧 朣:膧 杮:柿 榝:樧 涅:𣵀 溈:潙 玥:𤣽 "
    "研:硏 絕:絶 胼:腁 蒍:蔿 蘷:虁 訮:詽 讆:讏 豜:豣 贛:𥫔 赿:趆 跥:跺 躗:躛 軿:輧 郎:郞 鎭:鎮 隷:隸 鹂:鹃 "
    "黑:黒 Ꙍ:Ꞷ ꜧ:ꞕ Ꜿ:Ͽ ꜿ:ͽ Ꝺ:ꝺ Ꞇ:Ⴀ Ꞓ:Є ꞓ:ɛεєԑ 𛄢:于 𡚨:𡚧 𤠔:𪻅 𥄙:𥄚 𦖨:𦖝 𦰶:𦴆 𧢮:䚕 "
    # Right-to-left letters and combining marks, as escapes.
    "':\u05d9 3\u0326:\u0498 C\u0326:\u04aa D\u0335:\xd0\u0110\u0189 F\u0326:\u0191 H\u0326:\u04c7\u04c9 "
    "H\u0329:\u04a2\u2c67 K\u0329:\u049a\u2c69 K\u0335:\u049e\ua740 M\u0326:\u04cd N\u0326:\u019d "
    "O\u0335:\u019f\u0398\u03b8\u0472\u04e8\ua74a T\u0328:\u01ae Y\u0335:\u024e\u04b0 Z\u0326:\u0224 "
    "b\u0304:\u0182\u0183\u0411 b\u0314:\u0253 b\u0335:\u0180\u0462\u0463\u048c\u048d c\u0326:\u04ab "
    "d\u0304:\u018c d\u0314:\u0257 d\u0328:\u0256 e\u0328:\u04bf g\u0314:\u0260 h\u0314:\u0266\ua695 "
    "h\u0335:\u0127\u045b i\u0335:\u0268\u1d7b\u1d7c k\u0314:\u0199 l:\u05d5\u05df\u0627 ll:\u05f0 "
    "l\u0328:\u026d l\u0335:\u0197\u019a l\u0655:\u0673 l\u0674:\u0672 n\u0328:\u0273 "
    "n\u0329:\u014b\u019e\u03b7\u0572 o:\u05e1\u0647\u06be\u06c1\u06d5 o\u0302:\u06ff "
    "o\u0335:\u0275\u0473\u04e9\ua74b o\u0338:\xf8\uab3e o\u102c:\u1010\u10d7 p\u0314:\u01a5 q\u0314:\u02a0 "
    "rn\u0326:\u0271 r\u0328:\u027d r\u0335:\u024d\u0493 s\u0328:\u0282 t\u0314:\u01ad v:\u05d8 w\u0326:\ua761 "
    "y\u0314:\u01b4 y\u0335:\u024f\u04b1 z\u0326:\u0225 z\u0328:\u0290 \u0245\u0326:\u04c5 \u025c\u0326:\u0499 "
    "\u028d\u0326:\u04ce \u029c\u0326:\u04c8\u04ca \u0302:\u0311 \u0303:\u0342\u0653 \u0306:\u030c "
    "\u030a:\u309a \u0323:\u093c \u0326:\u0327 \u0328:\u0345 \u043b\u0326:\u04c6 \u04bc\u0328:\u04be "
    "\u0628\u0654:\u08a1 \u0629:\u06c3 \u062a:\u067a \u062a\u0306:\u08bf \u062d\u0654:\u0681\u0772 "
    "\u062f\u0302:\u06ee \u062f\u0324\u0323:\u08ae \u062f\u06db:\u068e\u068f \u0631\u0302:\u06ef "
    "\u0631\u0306:\u0692 \u0631\u0306\u0307:\u08b9 \u0631\u0654:\u076c \u0632\u0302:\u08b2 \u0633\u0302:\u077e "
    "\u0635\u0324\u0323:\u08af \u0641:\u06a7 \u0643:\u06a9\u06aa \u0643\u0306:\u08c2 \u0643\u06db:\u06ad\u0763 "
    "\u0644\u0306:\u06b5 \u0646\u0306:\u0769 \u0648:\u08b1 \u0648\u0302:\u06c9 \u0648\u0306:\u06c6 "
    "\u0648\u0313:\u06c7 \u0649:\u064a\u066e\u06ba\u06cc\u06d2\u08bd \u0649\u0302:\u063d "
    "\u0649\u0306:\u06ce\u0756 \u0649\u0306\u0307:\u08ba \u0649\u0615:\u0679\u06bb \u0649\u0654:\u08a8 "
    "\u0649\u06db:\u062b\u063f\u067e\u06bd\u06d1\u0752 \u067b:\u06d0 \u0686\u0306:\u08c1 "
    "\u06a1:\u066f\u08bb\u08bc \u06a1\u06db:\u06a4\u06a8 \u06ac:\u0762 \u06af:\u08b0 \u0754:\u0767\u08a9 "
    "\u0905\u0306:\u0972 \u090f\u0306:\u090d \u098b\u09c3:\u09e0\u09e1 \u0bb3:\u0bd7 \u0c12\u0c4c:\u0c14\u0c94 "
    "\u0c12\u0c55:\u0c13\u0c93 \u0c21\u0323:\u0c22 \u0c2c\u0323:\u0c2d \u0c35\u0323:\u0c37 \u0c96\u0323:\u0c16 "
    "\u0d28\u0d41:\u0d0c\u0d19 "
)

_PROTOTYPES = str.maketrans(
    {
        character: prototype
        for prototype, characters in (word.split(":") for word in _CONFUSABLES.split())
        for character in characters
    }
)


def skeleton(name: str) -> str:
    """Return the skeleton of a name, which is equal for names that look alike. Its length is bounded by the name's."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).translate(_PROTOTYPES))
