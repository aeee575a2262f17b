"""The words that the practice conversations are made of.  Only lists: what is asked about them is in `skills`."""

from __future__ import annotations

WORDS = tuple(
    """
    able above acid across act actor add adult after again age air alarm album alone also amber anchor angel animal
    ankle apple april apron arch arena arm army arrow art ash aunt author autumn awake axis baby back badge bag bake
    ball bamboo banana band bank barn base basket bath beach bean bear beard beauty bed beef bell belt bench berry
    bike bird biscuit black blanket block blood blue board boat body bone book boot border bottle bowl box boy brain
    branch bread brick bridge bright brother brown brush bucket bus butter button cabin cable cake camel camera camp
    candle candy cap car card carpet carrot castle cat cave cell chain chair chalk cheese cherry chest chicken child
    circle city clay clean clever clock cloud clown coal coast coat coffee coin cold color comb cook copper corn
    corner cotton couch cousin cow crab cream crew crop cross crowd crown cup curtain dance danger dark day deep deer
    desert desk diamond dinner dirt dish doctor dog doll door dragon dream dress drink drum duck dust eagle ear early
    earth east easy echo edge egg elbow engine evening eye fabric face fact fair family far farm fast father feather
    fence fern field finger fire fish flag flame flat floor flower flute fog food foot forest fork fox frame free
    fresh friend frog fruit game garage garden gate ghost giant gift girl glass glove goat gold good grape grass gray
    green ground group guest guitar hair half hall hammer hand happy harbor hat hawk heart heavy helmet hero hill
    hockey honey hook horse hotel hour house hunter ice idea inch ink insect iron island ivory jacket jam jar jelly
    jewel job joke judge juice jump jungle kettle key kid king kiss kitchen kite kitten knee knife ladder lake lamb
    lamp land large laser lawn leaf leather left leg lemon letter light lily lime line lion lip list little lizard
    lobster lock log long lunch machine magic mail map maple market mask meadow meal meat medal melon metal milk mill
    mind mint minute mirror money monkey month moon morning mother motor mouse mouth music nail name napkin narrow
    nation navy neck needle nest night noise north nose note number nurse oak oasis ocean office oil olive onion open
    orange orchard organ otter oven owl page paint palace palm panda paper parade parent park parrot party path peach
    peanut pear pearl pen pencil pepper piano picture pig pillow pilot pine pink pipe pirate planet plant plate
    plum pocket poem poet point pond pony pool potato pound prince prize pumpkin puppy purple puzzle queen quick quiet
    quilt rabbit radio rain ranch rat raven record red ribbon rice rich right ring river road robin robot rock rocket
    roof room root rope rose round rug ruler saddle safe sail salad salmon salt sand scarf school science sea seal
    season second seed shadow sheep shelf shell ship shirt shoe shop short silk silver simple sister skate skin sky
    sleep slow small smile smoke snail snake snow soap soccer sock sofa soft soil soldier song soup south space spade
    spider spoon spring square stable stairs star station steam steel stone storm story stove street strong sugar
    suit summer sun sweet swim table tail tailor tall tea teacher temple tent tiger time tin toast tomato tooth tower
    town toy train travel tree truck trumpet tulip tunnel turtle uncle under unicorn union upper urban useful valley
    van velvet video village violet violin voice wagon walk wall walnut water wave wax weather wedding week whale
    wheat wheel white wide wild wind window winter wire wolf wonder wood wool word work world yard year yellow yogurt
    young zebra zero zipper zone
    """.split()
)

CITIES = tuple(
    """
    Amsterdam,Ankara,Antwerp,Athens,Auckland,Austin,Bangkok,Barcelona,Basel,Beijing,Belfast,Belgrade,Bergen,Berlin,
    Bern,Bogota,Bologna,Bonn,Bordeaux,Boston,Brasilia,Bremen,Brisbane,Bristol,Brussels,Bucharest,Budapest,Cairo,
    Calgary,Canberra,Cape Town,Cardiff,Chennai,Chicago,Cologne,Copenhagen,Cork,Dakar,Dallas,Delhi,Denver,Detroit,
    Dresden,Dubai,Dublin,Dundee,Edinburgh,Florence,Frankfurt,Geneva,Genoa,Ghent,Glasgow,Graz,Halifax,Hamburg,Hanoi,
    Havana,Helsinki,Hong Kong,Houston,Istanbul,Jakarta,Jena,Karachi,Kiel,Kigali,Kingston,Kyoto,Lagos,Leeds,Leipzig,
    Lille,Lima,Linz,Lisbon,Liverpool,London,Los Angeles,Lucerne,Lyon,Madrid,Malaga,Malmo,Manchester,Manila,Marseille,
    Melbourne,Memphis,Miami,Milan,Monaco,Montreal,Moscow,Mumbai,Munich,Nairobi,Nantes,Naples,New York,Nice,Osaka,Oslo,
    Ottawa,Oxford,Palermo,Paris,Perth,Phoenix,Pisa,Porto,Prague,Quebec,Reykjavik,Riga,Rio,Rome,Rotterdam,Salzburg,
    Santiago,Seattle,Seoul,Seville,Shanghai,Sheffield,Singapore,Sofia,Stockholm,Strasbourg,Stuttgart,Sydney,Taipei,
    Tallinn,Tampere,Tokyo,Toronto,Toulouse,Trieste,Tromso,Tunis,Turin,Uppsala,Utrecht,Valencia,Vancouver,Venice,
    Verona,Vienna,Vilnius,Warsaw,Wellington,York,Zagreb,Zurich,Addis Ababa,Buenos Aires,Cape Coral,Den Haag,El Paso,
    Fort Worth,Grand Rapids,Iowa City,Kansas City,Kuala Lumpur,La Paz,Las Vegas,Little Rock,Long Beach,Mexico City,
    New Delhi,New Orleans,Novi Sad,Palo Alto,Panama City,Phnom Penh,Port Louis,Porto Alegre,Quezon City,Saint Louis,
    Salt Lake City,San Diego,San Jose,San Juan,Santa Cruz,Santa Fe,Sao Paulo,Tel Aviv,Tierra Verde
    """.replace("\n", "")
    .replace("    ", "")
    .split(",")
)

NAMES = tuple(
    """
    Ada Adam Alan Alex Alice Amir Amy Ana Anna Anton Ben Bob Carl Carla Chen Clara Dan Dana David Diana Elena Ella Emil
    Emma Eric Eva Felix Fiona Frank Grace Greta Hana Hans Hugo Ida Igor Ines Iris Ivan Jack Jan Jane Joe John Julia Kai
    Karl Kate Ken Lars Laura Lea Leo Lena Lina Lisa Lucas Lucy Luis Maja Marc Maria Mark Mary Max Mia Mila Nadia Nina
    Noah Nora Olga Omar Oscar Otto Paul Pedro Peter Petra Rita Rosa Ruth Sam Sara Simon Sofie Sven Tara Theo Tim Tina
    Tom Uma Vera Victor Will Yuki Yusuf Zara Zoe
    """.split()
)

TOPICS = tuple(
    """
    the moon,the sun,black holes,gravity,the weather,love,war,peace,Rome,Paris,Germany,China,football,
    chess,tennis,music,jazz,the piano,a cat,my dog,a dragon,an old tree,the sea,a storm,winter,summer,
    coffee,tea,bread,pizza,a cake,money,taxes,the stock market,a contract,an invoice,physics,chemistry,
    biology,mathematics,calculus,algebra,a prime,history,the Romans,Napoleon,Einstein,Newton,Shakespeare,
    Goethe,Python,Java,C,a linked list,a compiler,a database,Linux,the internet,a neural network,
    a transformer,attention,a mixture of experts,quantum computing,a computer,a phone,a car,a bicycle,
    a train,an aeroplane,a ship,space travel,Mars,dinosaurs,whales,birds,bees,the brain,the heart,sleep,
    dreams,a headache,vitamins,a diet,running,yoga,school,an exam,a job,an interview,my boss,a friend,
    a wedding,a birthday,a holiday,a hotel,a book,a film,a song,a poem,a painting,a house,a garden,
    a kitchen,a robot,happiness,time,death,God,freedom,justice,the law,politics,an election,
    the president,a king,a queen
    """.replace("\n", "")
    .replace("    ", "")
    .split(",")
)
