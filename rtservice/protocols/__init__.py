"""The protocols that ship with rtservice: ordinary Twisted protocols and factories."""
