"""Haiku, composed line by line: 5, 7 and 5 syllables, one scene, no word twice.

A scene holds three lists of line patterns (first, second, third line). `{a|b}` is a choice. Every line of a scene goes
with every other line of it, so a scene of 11 x 11 x 11 patterns with a few choices each gives many thousands of haiku.
`python haiku.py` checks every expansion's syllables and prints how many haiku there are, and a few of them.
"""

import itertools
import random
import re

SCENES = {
    "shot": (
        [
            "{Steel|Bright|Quick|Sharp} blades {carve|cut|score} the ice",
            "A {slap|wrist} shot {rises|whistles}",
            "The {winger|center|captain} {breaks free|cuts left|swings wide}",
            "One {quick|blind|soft} pass {slips|slides|sneaks} through",
            "{Sticks|Skates} {clash|meet} at center",
            "{Tape|Wood} {cracks|snaps} on rubber",
            "A {sudden|perfect} stretch pass",
            "{Two on one|Three on two}, they {come|rush}",
            "A rebound {lies|slides|skips} loose",
            "Off the {boards|glass}, a {pass|puck}",
        ],
        [
            "the goalie drops {one beat|a breath|a blink} late",
            "rubber {rings|sings|clangs} against the post",
            "a {flash|blur|streak} of black {finds|meets} the {net|mesh}",
            "red light {flashing|burning|blooming} behind {glass|him}",
            "the net {shivers|trembles} like a {leaf|sail|web}",
            "the whole {bench|crowd|block} leaps to its feet",
            "frozen rubber finds its mark",
            "no one sees it cross the line",
            "top shelf, under the crossbar",
            "the {puck|disk} vanishes, then light",
            "gloves go up {before|behind} the {horn|bench}",
            "one red light {blooms|burns|glows} in the {haze|dark}",
        ],
        [
            "the {whole|old} building {shakes|sings|roars}",
            "a {horn|shout|cheer} {fills|shakes} the {night|barn|rink}",
            "sticks rise in the air",
            "{winter|hockey} holds its breath",
            "the arena roars",
            "silence, then the horn",
            "strangers {hug|sing} and shout",
            "now the home side leads",
            "ten thousand voices",
            "no one {hears|minds} the {clock|cold}",
            "joy, {brief|bright} as a spark",
            "his {first|last} of the {year|night}",
        ],
    ),
    "goalie": (
        [
            "The goalie {crouches|hunches|listens}",
            "Behind the {white|scarred|steel} mask",
            "Alone in the crease",
            "Two {calm|dark|still} eyes {waiting|watching}",
            "{Pads|Knees} {pressed|locked} to the post",
            "Glove high, stick held low",
            "Masked, {patient|silent}, alone",
            "A wall of leather",
            "{Breath|Steam} {clouds|fogs} the {gray|cold} mask",
            "Last {line|hope} of defense",
            "The {young|old|tall} goaltender",
        ],
        [
            "watching every stick and skate",
            "a {black|hard} storm of pucks {rolls in|comes on}",
            "a puck {drops|dies} into the glove",
            "leather {swallows|catches} the {hard|last|low} shot",
            "{forty|thirty} shots, and none get {by|through|past}",
            "the {shot|puck} comes like {sudden|driven} {hail|sleet}",
            "one pad kicks the rebound {wide|clear|out}",
            "the whole game narrows to this",
            "nothing moves except {the|those} eyes",
            "pucks {pile|drift} up like {quiet|early} snow",
            "snow {gathers|settles} {around|beside} {the|each} {post|skate}",
        ],
        [
            "the {red|goal} lamp stays dark",
            "a wall {made|built} of breath",
            "{silence|winter} in {one|a} glove",
            "nothing {passes|gets by|slips through} now",
            "the net {sleeps|rests} behind",
            "none shall pass tonight",
            "and the {crowd|rink} exhales",
            "the post is a friend",
            "still as frozen pines",
            "then one slow, long breath",
            "a shutout {at last|tonight}",
            "calm as {falling|drifting} snow",
        ],
    ),
    "pond": (
        [
            "{Old|Black|Thick} ice on the {pond|lake}",
            "The {mill|duck|farm} pond {freezes|hardens}",
            "{Two boots mark each|Old boots mark the} goal",
            "{Children|Neighbors|Brothers|Cousins} {shovel|clear off} snow",
            "Bright scarves, borrowed sticks",
            "A tennis ball {skids|rolls}",
            "{Sunday|Winter|Early} afternoon",
            "{Father|Mother|Grandpa} laces skates",
            "No {boards|coach|clock} and {one|a} puck",
            "The {first|hard|long} freeze {at last|is here}",
            "{Laughter|Voices} on the {lake|pond}",
        ],
        [
            "{six|five|eight} kids chase {one|a} {frozen|worn-out} puck",
            "a dog steals the {puck|ball} {again|and runs}",
            "somebody's {brother|father|sister} plays {goal|net}",
            "crows {watch|judge} the game from {bare|dark|tall} pines",
            "the {score|game} is {lost|drowned} in laughter",
            "the {low|red|pale} sun slides behind {firs|pines|hills}",
            "steel blades {write|sketch} their {long|loose} {white|slow} loops",
            "mittens {cupped|curled} around {hot|warm|sweet} tea",
            "the game goes on {until|past the} dark",
            "{deep|green|thick} ice {sings|groans|hums} beneath {our|their} feet",
            "every {pass|goal} is argued twice",
            "snow begins to {fill|hide} the {lines|tracks|goal}",
        ],
        [
            "nobody {keeps|counts} score",
            "{supper|homework} {has to|will just} wait",
            "one last goal, then {home|soup|bed|stars}",
            "the moon {comes to watch|keeps the score}",
            "stars {skate on the ice|come out to play}",
            "{numb|cold} {toes|hands}, {happy|shining} eyes",
            "smoke from {every|a warm} {roof|house}",
            "somewhere a bell rings",
            "someone calls us home",
            "{winter|childhood} without end",
            "the whole world a rink",
            "next goal wins the {game|day}",
            "we play in the dark",
        ],
    ),
    "faceoff": (
        [
            "{Two|Both} centers {bend|lean|bow} low",
            "The anthem {fades out|trails off|is done}",
            "The {first|next|last} face-off {waits|looms}",
            "{Sticks|Blades} tap the red dot",
            "A hush {fills|takes} the rink",
            "Hush {over|across} {fresh|clean|new} ice",
            "{Fresh|Clean|New} ice {under|below} lights",
            "Center ice, {two|both} {sticks|blades}",
            "The {black|cold} puck {hovers|dangles}",
            "Ten skaters {line up|crouch low}",
            "Eyes meet {across|above} {ice|steel}",
        ],
        [
            "the linesman lets {the|a} {puck|disk} {fall|drop}",
            "one {small|black|round} puck {divides|decides} the {night|world}",
            "{breath|steam} {rising|hanging} {between|around} {two|the} masks",
            "everything waits for the {drop|puck|horn}",
            "a {small|cold} circle {holds|draws} the {crowd|night|light}",
            "thunder gathers in the {stands|seats|roof}",
            "time leans forward on its edge",
            "wrists and shoulders coiled like springs",
            "every {skate|eye|heart} is {turning|leaning} {in|close}",
            "no one {breathes|moves|speaks} {until|before} it {falls|drops}",
            "the crowd becomes {one|a} {held|deep|long} breath",
        ],
        [
            "then the {storm|war|game|dance} begins",
            "the puck {drops|falls} at last",
            "winter comes alive",
            "all at once, {they move|it breaks|the storm}",
            "steel bursts into song",
            "the night catches light",
            "one {stick|blade} is {quicker|faster}",
            "the {first|long} battle starts",
            "sixty minutes {start|wait}",
            "a {quick|bright} {flash|spark} of steel",
            "and everything moves",
        ],
    ),
    "practice": (
        [
            "{Dawn|Cold} practice {again|begins}",
            "{Five|Six} in the morning",
            "The {empty|silent} rink {hums|waits|gleams}",
            "{Sleepy|Yawning} kids lace up",
            "Before the sun {wakes|comes|shines}",
            "Frost on the {windows|headlights}",
            "{Orange|Yellow} cones {in rows|lined up}",
            "{Lights|Lamps} flicker awake",
            "The coach sips {coffee|cocoa}",
            "Cold {laces|leather}, stiff {hands|skates}",
        ],
        [
            "one {lone|slow} skater {draws|writes|carves} {long|white|wide} lines",
            "edges {hiss|sing} across the {sheet|dark}",
            "sprint to the far boards and back",
            "pucks {scatter|tumble} like {startled|frightened} {birds|crows}",
            "the coach taps {twice|once} and they {turn|go}",
            "breath {rises|drifts up} in {small|slow} white clouds",
            "someone {tapes|mends} a {broken|battered} stick",
            "parents {doze|nod|wait} behind {cold|thick|clear} glass",
            "coffee steams {behind|beside} the {glass|bench|boards}",
            "the first {sharp|clean|loud} stride {wakes|cuts} the {ice|hush}",
            "each {turn|stride} {spraying|throwing} {silver|powdered} snow",
        ],
        [
            "the world is still {dark|young|hushed}",
            "{blue|first} light on the {ice|boards|steel}",
            "sunrise on the {glass|ice|roof}",
            "still half in {a dream|their dreams}",
            "love is learned this way",
            "this is how dreams {start|grow}",
            "nothing else awake",
            "the day opens up",
            "one more lap, then {school|toast}",
            "morning {tastes|smells} of {steel|ice|frost}",
            "winter {hums|waits} outside",
        ],
    ),
    "overtime": (
        [
            "Overtime begins",
            "Score tied, seconds left",
            "{Ten|Nine|Five|Twelve} seconds {remain|to play}",
            "The clock {drains|slips|ticks} away",
            "{Heavy|Weary} legs {press|push} on",
            "Game seven, still tied",
            "The {final|closing} {shift|rush} {starts|comes}",
            "Sudden death tonight",
            "Third overtime now",
            "One last {breathless|frantic} rush",
            "Midnight. No one {leaves|sits|blinks}",
        ],
        [
            "lungs burn, and the ice turns {gray|soft|slow}",
            "a stick finds {a|one} seam of light",
            "the bench leans over the boards",
            "{mothers|fathers|grown men} cannot bear to look",
            "the puck {bounces|wobbles} {loose|free} in front",
            "a shot threads the {crowd|maze} of {skates|legs}",
            "every heartbeat {is|like} a drum",
            "all the noise {shrinks|folds} to {one|a} {breath|point}",
            "sweat freezes beneath the {pads|mask}",
            "nobody has left {a|their} seat",
            "the goalies {stare|gaze} down the {rink|ice}",
        ],
        [
            "one shot ends it all",
            "one bounce ends the {war|year|night}",
            "sudden, the red {light|lamp}",
            "then the {whole|long} night breaks",
            "heroes are made {here|now}",
            "heartbreak, by an inch",
            "the season decides",
            "{seasons|winters} end like this",
            "the horn, {then the|a great} roar",
            "hope {skates|glides} on thin ice",
            "{ice|time} itself holds still",
            "still no one goes home",
            "{dreams|years} hang on a {thread|stick}",
        ],
    ),
    "after": (
        [
            "The {stands|seats} are empty",
            "The last fan goes home",
            "After the {last horn|long game|loud night}",
            "{Lights|Lamps} {dim|fade} in the {roof|rink|barn}",
            "The {slow|old} ice machine",
            "The Zamboni {hums|rolls|turns}",
            "{Popcorn|Paper} under seats",
            "{Midnight|Quiet} at the rink",
            "{Scarred|Worn|Gouged} ice under {lamps|lights}",
            "Game over, doors close",
            "The {noise|roar|crowd} drains away",
        ],
        [
            "a {slow|great} machine {heals|mends} the {scars|ice}",
            "water {closes|covers} every {wound|scar|groove}",
            "{steam|mist} {lifts|curls} {softly|slowly} from the {sheet|floor|ice}",
            "wet ice {gleams|shines} like {polished|darkened} {stone|glass}",
            "the janitor {hums|sings} a {tune|song}",
            "one {lost|small} mitten on a {seat|step|bench}",
            "shadows {skate|glide} a {quiet|final} {lap|shift}",
            "the scoreboard forgets the {night|names}",
            "echoes {linger|settle} in the {beams|roof|stands}",
            "snow waits {outside|beyond} the {wide|steel|back} doors",
            "a {boy|girl|child} {waits|hopes} for one more {puck|stick|name}",
        ],
        [
            "the ice {forgives|forgets} all",
            "tomorrow, again",
            "{clean|smooth} as a {new|blank} page",
            "as if none had played",
            "only winter stays",
            "the rink {dreams|breathes} alone",
            "snow on the {parked cars|last bus|way home}",
            "{silence|darkness} like {fresh|new} snow",
            "somebody locks up",
            "the {cold|night} settles in",
            "the {goal|net} {rests|leans|waits} at last",
            "mirror for the moon",
        ],
    ),
    "puck": (
        [
            "A {small|hard} black {circle|shadow}",
            "The puck {skips|slides|spins} and {sings|hums|skids}",
            "{Small|Hard|Cold} disk of rubber",
            "Chased by every stick",
            "The puck {never|hardly} {rests|sleeps}",
            "One puck, {twenty|thirty} {sticks|skates|blades}",
            "{Flat|Round} as a {dark|lost} coin",
            "Out of the corner",
            "It {glides|slides} without {weight|sound}",
            "Three inches of {night|dark}",
        ],
        [
            "it rattles around the {boards|glass}",
            "hunted by a dozen {blades|sticks}",
            "somehow finds the {narrow|smallest} {gap|door}",
            "everyone {wants|needs} what it {knows|holds}",
            "a {crow|stone} {skipping|sliding} {over|across} {snow|frost|milk}",
            "the goalie loses its {trail|path|ghost}",
            "a {comet|swallow} {crossing|cutting} {white|pale} sky",
            "scarred by {iron|winter}, tape, and {wood|boards}",
            "one {bounce|touch|flick} and the whole {night|game} turns",
            "it {hops|jumps} over every {blade|stick}",
        ],
        [
            "then {sleeps|rests} in the net",
            "{nobody's|no one's now} for long",
            "small heart of the game",
            "the game's small black heart",
            "a {thud|clang|ring}, and it's {gone|in}",
            "always it comes home",
            "{free|loose} for one heartbeat",
            "the {red|bright} lamp {answers|wakes up}",
            "all eyes follow it",
            "it belongs to none",
            "winter in one stone",
            "the {rink|ice} keeps its {song|scars|tracks}",
            "a souvenir now",
        ],
    ),
    "penalty": (
        [
            "Two minutes, {hooking|tripping|roughing|slashing}",
            "The whistle {blows hard|cuts in|shrieks out}",
            "The penalty box",
            "Shoulder into boards",
            "The boards {boom|shake|groan} and ring",
            "{Helmets|Gloves lie} on the ice",
            "One {foolish|careless} high stick",
            "Alone behind glass",
            "The {striped|stern} referee",
            "Short-handed, they {wait|hold|fight}",
            "Four sticks against five",
        ],
        [
            "he watches the {slow|red|long} clock {drip|run|tick}",
            "teammates block shots {for his sake|in his place}",
            "a towel over the {face|head}",
            "guilt steams slowly off {his|the} {sleeves|pads}",
            "the crowd {pounds|bangs|drums} upon the glass",
            "the power play {circles|gathers} {in|close|near}",
            "{temper|anger} cooling like {hot|spent} steel",
            "through scratched glass he counts the {time|beats}",
            "one hundred and twenty {beats|ticks}",
            "both coaches {holler|mutter|grumble} {at once|again}",
        ],
        [
            "two minutes too long",
            "then the gate {swings|flies} wide",
            "{freedom|mercy} skates so slow",
            "the {ice|cold} forgives him",
            "patience learned {on ice|by frost}",
            "back into the {storm|fray|fight}",
            "{justice|order} on thin {steel|ice|blades}",
            "the {bench|crowd} understands",
            "no one has scored yet",
            "the horn sets him free",
            "worth it, he decides",
        ],
    ),
    "crowd": (
        [
            "{Ten|Twelve} thousand {voices|faces}",
            "{Banners|Old flags} in the {roof|beams}",
            "Hot {coffee|cocoa}, {cold seats|numb hands}",
            "{Painted|Hopeful} {faces|children} {sing|shout|wave}",
            "The {old|young} fan {whispers|listens}",
            "Strangers share a {coat|scarf|seat}",
            "A {wave|chant|song} rolls {around|and grows}",
            "{Drums|Horns} {behind|above} the {net|goal}",
            "{Grandfather|Grandmother} {stands up|hums low|claps hands}",
            "Warm breath against glass",
            "{Scarves|Caps} {raised|held} overhead",
        ],
        [
            "{leaning|swaying} like a single {tree|wave}",
            "they {know|sing} the names of old {ghosts|kings}",
            "popcorn scatters down the {rows|steps}",
            "a {boy|girl|child} {lifts|holds} a {homemade|crooked|painted} sign",
            "the roof {shivers|trembles} with {their|one} {song|name|roar}",
            "cold {hands|palms} clap until they {sting|glow|burn}",
            "every whistle {draws|earns} a {groan|sigh|gasp}",
            "someone's {hat|cap} {lands|spins} on the {ice|rink}",
            "trumpets, bells, and stamping {feet|boots}",
            "the puck drops and no one sits",
            "hope rises in every {throat|seat|row}",
        ],
        [
            "one heart, {many|open} {coats|hands}",
            "{winter|the night} {feels|grows} warm here",
            "this year {is|comes} for us",
            "the whole town is {here|hoarse|one}",
            "hoarse and happy, home",
            "love, {louder|brighter} than {drums|horns}",
            "win or lose, they {sing|stay}",
            "the last row stands {too|up}",
            "we {believe|belong} {again|tonight}",
            "{thunder|music} made of {hands|breath|throats}",
            "a {small|whole} city {sings|breathes|roars}",
        ],
    ),
    "memory": (
        [
            "The old {wooden|hockey} stick",
            "{Scuffed|Old} skates on a {nail|hook|shelf}",
            "{Faded|Dusty} team {photo|jersey|banner}",
            "The {locker|dressing} room {hums|steams|waits}",
            "Tape, leather, and sweat",
            "{Up in|Inside} the attic",
            "The season is done",
            "Lost by {one|a} late goal",
            "The captain sits still",
            "{Bruised|Sore} knees, {crooked|gap-toothed} {smile|grin}",
            "{Wet|Worn} gloves on the {pipes|rail}",
        ],
        [
            "tape unravels from the {blade|shaft|heel}",
            "father's name {carved|burned} in the {wood|grain|shaft}",
            "the smell of winters {long gone|gone by|before}",
            "dust where thunder used to {live|be}",
            "every {scratch|dent|nick} a story told",
            "no one speaks of that last {shot|shift|goal}",
            "someone rests a {gentle|quiet} hand",
            "steam and laughter fill the {room|hall|air}",
            "handshakes in a {quiet|solemn} line",
            "laces {still|yet} recall each {knot|night|game}",
            "snow {taps|falls} {softly|lightly} at the {pane|door|glass}",
        ],
        [
            "next winter, {again|we vow}",
            "still it {smells|dreams} of {ice|snow|frost}",
            "the {boy|girl|child} {inside|in me} {skates|wakes}",
            "{hands|hearts} remember all",
            "years melt like March snow",
            "it was only {love|play|ice}",
            "a game never ends",
            "proud of {every|each cold} {scar|bruise}",
            "{somewhere|outside}, blades still {sing|turn}",
            "spring can wait {a while|outside}",
            "the ice {calls|waits} {for us|once more}",
            "we lace up {again|once more}",
        ],
    ),
    "play": (
        [
            "{Six|Five} {sticks|blades} {move|turn|weave} as one",
            "{Over|Across} the blue line",
            "Skate, turn, pass, and {shoot|wait|look}",
            "Cold air, {burning|heavy} {lungs|legs}",
            "{Snow|Spray} {flies|leaps} from {hard|quick} {stops|turns}",
            "Over the boards, go",
            "Line change on the {fly|run}",
            "{Shoulders|Sticks held} low, {they fly|they rush|blades hum}",
            "{Blue|Red|White} {jerseys|sweaters} {blur|flash|stream} {by|past}",
            "The coach paces, {frowns|nods|stops}",
            "Speed on two thin blades",
        ],
        [
            "the {play|pass} {opens|blossoms} like a {fan|hand|door|wing}",
            "no one says a word, they {know|pass|move}",
            "ice {sprays|sparks} {silver|upward} from {each|one} {stop|turn|edge}",
            "one {touch|glance}, and the {lane|way} is {clear|there}",
            "a {long|clean} pass crosses the {rink|ice}",
            "the defense {scatters|crumbles} like {snow|leaves|ash}",
            "boards {thunder|rumble} as {bodies|shoulders} {meet|crash}",
            "a {stick|glove} {lifts|flicks}, and the puck {sails|floats}",
            "the whole rink tilts to one {net|goal}",
            "wind sings through the {cage|mask} and {lungs|teeth|hair}",
            "sweat and {frost|snow} on every {brow|sleeve}",
        ],
        [
            "{steel|blades} {singing|humming} on frost",
            "this is how we {fly|dance|pray}",
            "the game {breathes|flows|runs} {through us|like wind}",
            "{fast|swift|quick} as {falling|driven} {stars|snow|sleet}",
            "{winter|tonight}, we have wings",
            "{five|six} hearts, a drumbeat",
            "the {cold|ice} {cannot|will not} {win|hold}",
            "the far goal {beckons|shivers}",
            "a whistle, and {rest|peace|steam}",
            "{chaos|beauty}, at {full|high} speed",
            "the bench {bangs|beats|taps} its {sticks|thanks}",
        ],
    ),
    "winter": (
        [
            "Snow {falls|drifts} on the {roof|road|barn|pines}",
            "{First|Light|Soft} snow of the {year|night}",
            "The {long|cold|blue} night {deepens|settles}",
            "January {dusk|dawn|wind|moon}",
            "{December|November} {twilight|evening}",
            "{Frost|Ice} on {every|the bare} {branch|fence}",
            "The {north|cold|east} wind {settles|hurries}",
            "Bare birches bend low",
            "Deep snow, no footprints",
            "An icicle {grows|drips|gleams}",
            "Thin smoke {climbs|lifts} {straight up|and bends}",
        ],
        [
            "the {whole|small} village {sleeps|rests} in white",
            "a {gray|lone|red} fox {crosses|follows} the {field|creek|road}",
            "every window a {warm|small|gold} star",
            "the {creek|stream} {murmurs|whispers} {under|below} {glass|ice}",
            "stars {glitter|tremble} above {black|dark|still} pines",
            "a train calls across the {fields|dark|hills}",
            "the moon {pours|spills} {milk|light} {over|on the} {roofs|fields|hills}",
            "someone clears a {narrow|little} path",
            "even the {crows|dogs|owls} have gone still",
            "a kettle {hums|sings} in the {house|dark}",
            "{white|soft} flakes {gather|settle} on {dark|wool} {sleeves|coats}",
        ],
        [
            "the world holds its breath",
            "{morning|springtime} feels far off",
            "warm {bread|tea|mugs} in {our|both} hands",
            "{only|even} the {stars|clouds} move",
            "{spring|sleep} {waits|lies} underneath",
            "the hush covers all",
            "{peace|hush} without a {sound|word|name}",
            "a {dog|bell|door} far away",
            "{deep|slow} dreams of the {earth|ice|sun}",
            "we walk slowly home",
            "the night {turns|grows} silver",
            "no {tracks|steps} but {our own|the wind's}",
        ],
    ),
    "skating": (
        [
            "New skates, {shaky|trembling} {knees|steps}",
            "A child's {first small|careful} {stride|glide}",
            "{Blades|Skates} {whisper|murmur} {on|to} ice",
            "{Slow|Wide} loops on the {lake|pond|rink}",
            "The {frozen|silver} canal",
            "Laced tight, the old skates",
            "Arms out like {a bird|two wings|thin wings}",
            "{Backward|Sideways} on one {edge|foot|blade}",
            "{Moonlight|Lamplight} on the {ice|rink|lake}",
            "An old man {glides|skates} {by|past}",
            "Under {paper|yellow} {lamps|lights}",
        ],
        [
            "figure eights unfold and {close|fade}",
            "each turn {leaves|draws} a {silver|slender} {thread|line}",
            "the {cold|clear} air {tastes|smells} of {iron|metal|evening}",
            "a {song|waltz} {drifts|floats} from the speakers",
            "gravity {forgets|mislays} {my|our|your} name",
            "we fall, laugh, and {start|stand|rise} again",
            "scarves {stream|float} {behind|beside} us like {flags|wings|smoke}",
            "the wind {pushes|hurries} us {along|ahead}",
            "one foot {crosses|follows}, then the {turn|glide|next}",
            "children {circle|orbit} like {small|bright} {moons|birds}",
            "the {dark|deep} water {sleeps|waits} below",
        ],
        [
            "{almost|nearly} like flying",
            "the {world|heart} {glides|spins} along",
            "{winter|the cold} sets us free",
            "{snow begins to fall|stars begin to turn}",
            "nothing weighs us down",
            "ten more minutes, please",
            "{cheeks|ears} {red|bright} as {apples|berries}",
            "the {ice|lake} {hums|sings} {along|softly}",
            "joy needs no {reason|language|music}",
            "a {line|trail} made of light",
            "my heart keeps the {time|beat}",
            "one {long|slow|clean} breath of {air|cold|joy}",
        ],
    ),
}

HOCKEY = ["shot", "goalie", "pond", "faceoff", "practice", "overtime", "after", "puck", "penalty", "crowd", "memory",
          "play"]

# What ends the first and the second line; the third ends with a full stop. Never the same mark twice.
ENDS = [("", ""), (",", " \u2014"), (" \u2014", ""), (",", ""), ("", ","), ("", " \u2014"), (" \u2014", ","), ("", ";")]

_CHOICE = re.compile(r"\{([^{}]*)\}")


def expansions(pattern: str) -> list[str]:
    """Every line that a pattern stands for."""
    parts = _CHOICE.split(pattern)
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(line) for line in itertools.product(*choices)]


def words(text: str) -> list[str]:
    """The words in lower case, "face-off" one of them."""
    return re.findall(r"[a-z]+(?:['-][a-z]+)*", text.lower())


def stem(word: str) -> str:
    """A word without its plural or verb ending, so that "falls" and "falling" count as one."""
    for end in ("'s", "ing", "es", "ed", "s"):
        if word.endswith(end) and len(word) - len(end) >= 3:
            return word[: -len(end)]
    return word


def repeats(text: str) -> bool:
    """Whether a word comes back: articles may, once."""
    seen: dict[str, int] = {}
    for word in words(text):
        seen[stem(word)] = seen.get(stem(word), 0) + 1
    return any(n > (2 if word in ("the", "a") else 1) for word, n in seen.items())


def haiku(rng: random.Random, scene: str) -> str:
    """Three lines, separated by newlines."""
    while True:
        first, second, third = (rng.choice(patterns) for patterns in SCENES[scene])
        lines = [_CHOICE.sub(lambda m: rng.choice(m[1].split("|")), line) for line in (first, second, third)]
        if repeats(" ".join(lines)):
            continue
        ends = rng.choice(ENDS)
        if any("," in line and "," in "".join(ends) for line in lines) or sum("," in line for line in lines) > 1:
            continue
        return f"{lines[0]}{ends[0]}\n{lines[1]}{ends[1]}\n{lines[2]}."


# Words whose syllables are not their groups of vowels, less a silent final e.
_SYLLABLES = {
    "quiet": 2, "being": 2, "beyond": 2, "flying": 2, "hundred": 2, "somehow": 2, "spraying": 2, "swaying": 2,
    "iron": 2, "chaos": 2, "every": 2, "evening": 2, "something": 2, "somewhere": 2,
    "someone": 2, "someone's": 2, "somebody": 3, "somebody's": 3, "everyone": 3, "everything": 3, "sometimes": 2,
    "goalie": 2, "goalies": 2, "rookie": 2, "sixty": 2, "face-off": 2, "overtime": 3, "homemade": 2, "homework": 2,
    "breathes": 1, "closes": 2, "crosses": 2, "lean": 1, "period": 3, "arena": 3, "wooden": 2, "handshakes": 2,
    "narrows": 2, "january": 4, "icicle": 3, "circle": 2, "single": 2, "little": 2, "apples": 2, "kettle": 2,
    "gentle": 2, "battle": 2, "hustle": 2, "whistle": 2, "whistles": 2, "rattles": 2, "settles": 2, "settle": 2,
    "tumble": 2, "trembles": 2, "tremble": 2, "crumbles": 2, "grumble": 2, "rumble": 2, "wobbles": 2, "shoulder": 2,
    "dangles": 2, "startled": 2, "careful": 2, "careless": 2, "wrist": 1, "gap-toothed": 2, "short-handed": 3,
    "outside": 2, "inside": 2, "sideways": 2, "beside": 2, "worn-out": 2, "teammates": 2, "headlights": 2,
    "scarves": 1, "gloves": 1, "sleeves": 1, "waves": 1, "leaves": 1, "loses": 2, "vanishes": 3, "bounces": 2,
    "paces": 2, "faces": 2, "voices": 2, "laces": 2, "rises": 2, "freezes": 2, "crouches": 2, "hunches": 2,
    "passes": 2, "coaches": 2, "birches": 2, "edges": 2, "inches": 2, "watches": 2, "catches": 2, "pushes": 2,
    "souvenir": 3, "gravity": 3, "defense": 2, "crossbar": 2, "heartbreak": 2, "childhood": 2, "hopeful": 2,
    "orange": 2, "mustard": 2, "afternoon": 3, "sunrise": 2, "underneath": 3, "scoreboard": 2, "slashing": 2,
    "power": 2, "towel": 2, "lines": 1, "linesman": 2, "referee": 3, "powdered": 2, "argued": 2, "twelve": 1,
    "forgives": 2, "decides": 2, "divides": 2, "hockey": 2, "jerseys": 2, "jersey": 2, "patient": 2, "patience": 2,
    "tomorrow": 3, "beauty": 2, "fathers": 2, "heroes": 2, "overhead": 3, "rebound": 2, "shoes": 1, "eyes": 1,
    "exhales": 2, "wedges": 2, "narrow": 2, "echoes": 2, "zamboni": 3, "careened": 2, "berries": 2, "bodies": 2,
    "neighbors": 2, "earth": 1, "mislays": 2, "eighth": 1, "hooded": 2, "crooked": 2, "lamplight": 2, "moonlight": 2,
    "firs": 1, "one's": 1, "wind's": 1, "child's": 1, "game's": 1, "it's": 1, "safety": 2, "clothes": 1,
}


def syllables(text: str) -> int:
    return sum(_SYLLABLES[word] if word in _SYLLABLES else _vowel_groups(word) for word in words(text))


def _vowel_groups(word: str) -> int:
    word = word.removesuffix("'s")
    groups = len(re.findall(r"[aeiouy]+", word))
    silent = re.search(r"[^aeiouyl]e$|[aeiouy]le$|[^aeiouytd]ed$|[aeiouy]\w*[^aeiouyszxhcgl]es$|[aeiou]les$|thes$", word)
    return max(1, groups - bool(silent))


def check() -> None:
    """Fails when a line has not 5 or 7 syllables, or repeats a word."""
    for scene, parts in SCENES.items():
        for want, patterns in zip((5, 7, 5), parts):
            for line in (line for pattern in patterns for line in expansions(pattern)):
                if syllables(line) != want:
                    raise ValueError(f"scene {scene}: {syllables(line)} syllables, not {want}: {line}")


if __name__ == "__main__":
    check()
    total = 0
    for scene, parts in SCENES.items():
        counts = [sum(len(expansions(pattern)) for pattern in patterns) for patterns in parts]
        total += counts[0] * counts[1] * counts[2]
        print(f"{scene:9} {counts[0]:4} x {counts[1]:3} x {counts[2]:3} lines")
    print(f"{total:,} haiku, before the ends of lines are chosen and repeated words are refused")
    rng = random.Random(1)
    for scene in SCENES:
        print("\n" + haiku(rng, scene))
