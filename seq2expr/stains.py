"""What haematoxylin and eosin take up of red, green and blue.

Optical densities of unit length (Ruifrok & Johnston 2001, *Quantification of histochemical
staining by color deconvolution*).
"""

HAEMATOXYLIN = (0.650, 0.704, 0.286)
EOSIN = (0.072, 0.990, 0.105)
