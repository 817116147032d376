"""How many drafts pay: what a forward costs (`cost`, `roofline`), and the choice (`auto`)."""
